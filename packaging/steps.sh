# What install-host and install-storage share: each step says what it did, and does nothing the second time.
# The script that reads this has set `here` (packaging/) and `log`, and reads `changed` at its end.
# shellcheck shell=bash disable=SC2034,SC2154

shopt -s lastpipe # what stands at the end of a pipe may set `changed`
changed=0

say() { echo "$(basename "$0"): $*"; }

did() {
    changed=1
    say "$@"
}

fail() {
    echo "$(basename "$0"): error: $1" >&2
    echo "what to do: $2" >&2
    exit 1
}

need_root() { [ "$(id -u)" = 0 ] || fail "this installs services, so it must be root" "run it with sudo"; }

# install_packages KIND...: Debian's packages of these kinds, as far as they are missing.
install_packages() {
    local kind package missing=()
    for kind; do
        while read -r package; do
            dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q ' installed$' || missing+=("$package")
        done < <(awk -v kind="$kind" '$1 == kind { print $2 }' "$here/packages")
    done
    if ((${#missing[@]} == 0)); then return; fi
    did "installing ${missing[*]} ..."
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -q update && apt-get -q install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 ||
        { tail -n 15 "$log" >&2; fail "apt could not install them" "see $log; are Debian's servers reachable?"; }
}

# put MODE FILE: standard input becomes the content of FILE, unless it is that already.
put() {
    local mode=$1 file=$2 new
    new=$(mktemp)
    cat >"$new"
    if ! cmp -s "$new" "$file"; then
        install -D -m "$mode" "$new" "$file"
        did "wrote $file"
    fi
    rm -f "$new"
}

# Whether this machine was booted with systemd (a container or a chroot may only have its programs).
has_systemd() { [ -d /run/systemd/system ]; }
