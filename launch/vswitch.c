/* A network switch in user space, for hosts that are namespaces of one machine: every frame waits as long as its link
 * would need. Linux can do that itself where the kernel has netem; many machines have it not, or not for us.
 *
 *   vswitch CONTROL DEVICE...       makes the TAP devices, then joins them until it is killed
 *
 * CONTROL is a FIFO. Lines that come through it change the network at once:
 *   link DELAY_US MBIT_PER_S        of every link, in each direction; a rate of 0 is unlimited
 *   cut DEVICE, heal DEVICE         nothing passes to and from it any more, or again
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { MAX_PORTS = 64, QUEUE_FRAMES = 4096, FRAME_BYTES = 65600, MAC_BYTES = 6, BURST = 64 };

struct frame {
    int64_t due; /* ns, CLOCK_MONOTONIC */
    size_t size;
    unsigned char bytes[];
};

struct port {
    const char *name;
    int device;
    int is_cut;
    unsigned char mac[MAC_BYTES]; /* of its host, once it has sent something */
    int64_t sent;                 /* when its latest frame has left the host */
    struct frame *queue[QUEUE_FRAMES]; /* to the host, in order: [head, tail) modulo its length */
    unsigned head, tail;
};

static struct port ports[MAX_PORTS];
static int num_ports;
static int64_t delay_ns;
static double ns_per_byte;

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static int open_tap(const char *name)
{
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI};
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (device < 0 || ioctl(device, TUNSETIFF, &request) < 0) {
        fprintf(stderr, "vswitch: %s: %s\n", name, strerror(errno));
        exit(1);
    }
    return device;
}

/* Frames to one host keep their order, also when the delay has just become shorter. A full queue drops, as a switch does. */
static void enqueue(struct port *port, const unsigned char *bytes, size_t size, int64_t due)
{
    unsigned next = (port->tail + 1) % QUEUE_FRAMES;
    struct frame *frame = next == port->head ? NULL : malloc(sizeof *frame + size);
    if (!frame)
        return;
    if (port->head != port->tail) {
        int64_t last = port->queue[(port->tail + QUEUE_FRAMES - 1) % QUEUE_FRAMES]->due;
        due = last > due ? last : due;
    }
    frame->due = due;
    frame->size = size;
    memcpy(frame->bytes, bytes, size);
    port->queue[port->tail] = frame;
    port->tail = next;
}

static int find(const unsigned char *mac)
{
    for (int i = 0; i < num_ports; i++)
        if (!memcmp(ports[i].mac, mac, MAC_BYTES))
            return i;
    return -1;
}

/* An unknown destination, and all with the group bit, goes to every host. */
static void forward(struct port *from, const unsigned char *bytes, size_t size)
{
    int64_t time = now();
    int to = bytes[0] & 1 ? -1 : find(bytes);
    memcpy(from->mac, bytes + MAC_BYTES, MAC_BYTES);
    if (from->is_cut)
        return;
    from->sent = (from->sent > time ? from->sent : time) + (int64_t)(size * ns_per_byte);
    for (struct port *port = ports; port < ports + num_ports; port++)
        if (port != from && !port->is_cut && (to < 0 || port == ports + to))
            enqueue(port, bytes, size, from->sent + delay_ns);
}

static void receive(struct port *port)
{
    static unsigned char bytes[FRAME_BYTES];
    for (int i = 0; i < BURST; i++) {
        ssize_t size = read(port->device, bytes, sizeof bytes);
        if (size < 2 * MAC_BYTES)
            return;
        forward(port, bytes, size);
    }
}

/* Returns when the next frame is due, or INT64_MAX. */
static int64_t deliver(void)
{
    int64_t time = now(), next = INT64_MAX;
    for (struct port *port = ports; port < ports + num_ports; port++) {
        while (port->head != port->tail && port->queue[port->head]->due <= time) {
            struct frame *frame = port->queue[port->head];
            ssize_t written = port->is_cut ? 0 : write(port->device, frame->bytes, frame->size);
            (void)written; /* a host that cannot take it loses it, as on a wire */
            free(frame);
            port->head = (port->head + 1) % QUEUE_FRAMES;
        }
        if (port->head != port->tail && port->queue[port->head]->due < next)
            next = port->queue[port->head]->due;
    }
    return next;
}

static void set_cut(const char *name, int is_cut)
{
    for (struct port *port = ports; port < ports + num_ports; port++)
        if (!strcmp(port->name, name))
            port->is_cut = is_cut;
}

static void obey(int control)
{
    static char text[256];
    static size_t length;
    ssize_t size = read(control, text + length, sizeof text - 1 - length);
    length += size > 0 ? (size_t)size : 0;
    text[length] = 0;
    for (char *end; (end = strchr(text, '\n')); length -= end + 1 - text, memmove(text, end + 1, length + 1)) {
        double delay_us, mbit_per_s;
        char name[IFNAMSIZ];
        if (sscanf(text, "link %lf %lf", &delay_us, &mbit_per_s) == 2) {
            delay_ns = (int64_t)(delay_us * 1e3);
            ns_per_byte = mbit_per_s > 0 ? 8e3 / mbit_per_s : 0;
        } else if (sscanf(text, "cut %15s", name) == 1) {
            set_cut(name, 1);
        } else if (sscanf(text, "heal %15s", name) == 1) {
            set_cut(name, 0);
        }
    }
    if (length == sizeof text - 1)
        length = 0; /* no line of ours is so long */
}

static void serve(int control)
{
    struct pollfd waits[MAX_PORTS + 1] = {{.fd = control, .events = POLLIN}};
    for (int i = 0; i < num_ports; i++)
        waits[i + 1] = (struct pollfd){.fd = ports[i].device, .events = POLLIN};
    for (;;) {
        int64_t next = deliver(), left = next - now();
        struct timespec time = {left > 0 ? left / 1000000000 : 0, left > 0 ? left % 1000000000 : 0};
        if (ppoll(waits, num_ports + 1, next == INT64_MAX ? NULL : &time, NULL) <= 0)
            continue;
        if (waits[0].revents & POLLIN)
            obey(control);
        for (int i = 0; i < num_ports; i++) {
            if (waits[i + 1].revents & POLLIN)
                receive(&ports[i]);
            else if (waits[i + 1].revents)
                waits[i + 1].fd = -1; /* its host has gone, and the device with it */
        }
    }
}

int main(int count, char **arguments)
{
    int control = count > 2 && count - 2 <= MAX_PORTS ? open(arguments[1], O_RDWR | O_NONBLOCK | O_CLOEXEC) : -1;
    if (control < 0) {
        fprintf(stderr, "usage: vswitch CONTROL DEVICE... (a FIFO, up to %d devices)\n", MAX_PORTS);
        return 2;
    }
    prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
    for (num_ports = 0; num_ports < count - 2; num_ports++)
        ports[num_ports] = (struct port){.name = arguments[num_ports + 2], .device = open_tap(arguments[num_ports + 2])};
    puts("ready");
    fflush(stdout);
    serve(control);
}
