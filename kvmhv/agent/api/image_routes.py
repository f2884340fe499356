"""Routes of imported images: kernel, initrd and disk files that VMs are made from."""

from kvmhv.agent.api.route import Call, Query, Route
from kvmhv.agent.api.services import Services
from kvmhv.errors import CallerError
from kvmhv.model import DiskFormat, Image

PARTS = ("kernel", "initrd", "disk")


async def list_images(api: Services, call: Call) -> tuple[Image, ...]:
    """Answer GET /v1/images."""
    return await api.images.list()


async def store(api: Services, call: Call) -> Image:
    """Answer PUT /v1/images/{name}/{part}."""
    part = call.path("part")
    if part not in PARTS:
        raise CallerError(
            "image-part", f"an image has no part {part!r}", f"the parts are {', '.join(PARTS)}", http_status=404
        )
    text = call.text("format")
    try:
        disk_format = DiskFormat(text) if text is not None else None
    except ValueError as error:
        raise CallerError("request-invalid", f"{text!r} is no disk format", "qcow2 or raw") from error
    return await api.images.store(
        call.path("name"), part, call.chunks(), append=call.text("append"), format=disk_format
    )


async def remove(api: Services, call: Call) -> None:
    """Answer DELETE /v1/images/{name}."""
    await api.images.remove(call.path("name"))


IMAGE_ROUTES = (
    Route(
        method="GET",
        path="/v1/images",
        doc="The imported images.",
        handler=list_images,
        response=tuple[Image, ...],
    ),
    Route(
        method="PUT",
        path="/v1/images/{name}/{part}",
        doc="Upload a part of an image: kernel, initrd or disk.",
        handler=store,
        upload=True,
        response=Image,
        query=(
            Query(name="append", doc="Kernel command line of VMs made from the image."),
            Query(name="format", doc="Format of a disk (qcow2, raw); without it the file tells."),
        ),
    ),
    Route(method="DELETE", path="/v1/images/{name}", doc="Remove an image.", handler=remove),
)
