/* The power button: kvmhv's `vm stop` presses it, and the guest powers off in order. */
#include <fcntl.h>
#include <linux/input.h>
#include <poll.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "work.h"

enum { INPUTS_MAX = 8 };

static int has_power_key(int file)
{
    unsigned long keys[KEY_MAX / 8 / sizeof(unsigned long) + 1] = {0};
    const int bits = 8 * sizeof keys[0];

    return ioctl(file, EVIOCGBIT(EV_KEY, sizeof keys), keys) >= 0 && keys[KEY_POWER / bits] >> KEY_POWER % bits & 1;
}

void *button_thread(void *unused)
{
    struct pollfd inputs[INPUTS_MAX];
    struct input_event event;
    nfds_t count = 0;
    char path[32];

    (void)unused;
    for (int i = 0; i < INPUTS_MAX; i++) {
        snprintf(path, sizeof path, "/dev/input/event%d", i);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0)
            continue;
        if (has_power_key(file))
            inputs[count++] = (struct pollfd){.fd = file, .events = POLLIN};
        else
            close(file);
    }
    if (!count) {
        fprintf(stderr, "work: no power button\n");
        return NULL;
    }
    while (poll(inputs, count, -1) > 0)
        for (nfds_t i = 0; i < count; i++)
            if (inputs[i].revents && read(inputs[i].fd, &event, sizeof event) == sizeof event &&
                event.type == EV_KEY && event.code == KEY_POWER && event.value == 1) {
                execl("/bin/busybox", "poweroff", (char *)NULL);
                perror("work: poweroff");
            }
    return NULL;
}
