/*
 * cameras ROOT PROGRAM ARGUMENT... runs a program below ROOT, where its ioctls
 * on /dev/video* are answered as cameras would, with the structures of the
 * kernel's headers. The program is as it is shipped: its ioctls come here as
 * notifications of seccomp(2). It is not root.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/videodev2.h>
#include <poll.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static void must(int ok, const char *what)
{
	if (!ok) {
		perror(what);
		exit(99);
	}
}

struct mode {
	__u32 format, width, height, fps[3]; /* fps: pictures in 10 s, 0 ends */
};

struct node {
	const char *name, *card;
	__u32 capabilities, device_caps;
	__u32 formats[3];
	struct mode modes[4];
};

#define ALL (V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_META_CAPTURE | V4L2_CAP_STREAMING | V4L2_CAP_DEVICE_CAPS)
#define CAPTURE (V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING)

static const struct node nodes[] = {
	/* A webcam of 2012: raw is slow where it is large. */
	{"video0", "HD Pro Webcam", ALL, CAPTURE, {V4L2_PIX_FMT_YUYV, V4L2_PIX_FMT_MJPEG},
	 {{V4L2_PIX_FMT_YUYV, 640, 480, {300, 150, 75}},
	  {V4L2_PIX_FMT_YUYV, 1280, 720, {100}},
	  {V4L2_PIX_FMT_MJPEG, 1280, 720, {300, 250}},
	  {V4L2_PIX_FMT_MJPEG, 640, 480, {300, 250}}}},
	{"video1", "HD Pro Webcam", ALL, V4L2_CAP_META_CAPTURE | V4L2_CAP_STREAMING, {V4L2_META_FMT_UVC}, {{0}}},
	/* A name as only an attacker has it, and too slow for MPEG-1. */
	{"video2", "\x1b[2J$(reboot)`'\"\xff\u202e\xc2\x9b" "1234567890", ALL, CAPTURE, {V4L2_PIX_FMT_YUYV, V4L2_PIX_FMT_MJPEG},
	 {{V4L2_PIX_FMT_YUYV, 640, 480, {50}},
	  {V4L2_PIX_FMT_MJPEG, 640, 480, {150}}}},
	/* A board's camera: any size, any rate. An old driver: no device_caps. */
	{"video10", "mmal service", CAPTURE, 0, {V4L2_PIX_FMT_YUV420}, {{0}}},
	/* ffmpeg does not read its format. */
	{"video11", "Depth", ALL, CAPTURE, {V4L2_PIX_FMT_INZI}, {{V4L2_PIX_FMT_INZI, 640, 480, {300}}}},
	/* A codec of the board, which is no camera. */
	{"video12", "codec", V4L2_CAP_VIDEO_M2M_MPLANE | V4L2_CAP_DEVICE_CAPS, V4L2_CAP_VIDEO_M2M_MPLANE, {0}, {{0}}},
};

static int query(const struct node *n, unsigned long request, void *arg)
{
	__u32 i = *(__u32 *)arg; /* index, but for QUERYCAP */

	if (request == VIDIOC_QUERYCAP) {
		struct v4l2_capability *c = arg;
		memset(c, 0, sizeof *c);
		strcpy((char *)c->driver, "cameras");
		strncpy((char *)c->card, n->card, sizeof c->card); /* a long one has no zero */
		strcpy((char *)c->bus_info, "usb-1");
		c->version = 0x060102;
		c->capabilities = n->capabilities;
		c->device_caps = n->device_caps;
		return 0;
	}
	if (request == VIDIOC_ENUM_FMT) {
		struct v4l2_fmtdesc *d = arg;
		if (d->type != V4L2_BUF_TYPE_VIDEO_CAPTURE || i >= 3 || !n->formats[i])
			return -EINVAL;
		d->pixelformat = n->formats[i];
		sprintf((char *)d->description, "format %u", i);
		return 0;
	}
	if (request == VIDIOC_ENUM_FRAMESIZES) {
		struct v4l2_frmsizeenum *e = arg;
		if (n->formats[0] == V4L2_PIX_FMT_YUV420) {
			if (i > 0)
				return -EINVAL;
			e->type = V4L2_FRMSIZE_TYPE_STEPWISE;
			e->stepwise = (struct v4l2_frmsize_stepwise){32, 2592, 2, 32, 1944, 2};
			return 0;
		}
		for (const struct mode *m = n->modes; m < n->modes + 4; m++)
			if (m->format && m->format == e->pixel_format && i-- == 0) {
				e->type = V4L2_FRMSIZE_TYPE_DISCRETE;
				e->discrete.width = m->width;
				e->discrete.height = m->height;
				return 0;
			}
		return -EINVAL;
	}
	if (request == VIDIOC_ENUM_FRAMEINTERVALS) {
		struct v4l2_frmivalenum *e = arg;
		if (n->formats[0] == V4L2_PIX_FMT_YUV420) {
			if (i > 0 || e->width != 640 || e->height != 480)
				return -EINVAL;
			e->type = V4L2_FRMIVAL_TYPE_CONTINUOUS;
			e->stepwise.min = (struct v4l2_fract){1, 90};
			e->stepwise.max = (struct v4l2_fract){1, 1};
			e->stepwise.step = (struct v4l2_fract){1, 1};
			return 0;
		}
		for (const struct mode *m = n->modes; m < n->modes + 4; m++)
			if (m->format == e->pixel_format && m->width == e->width && m->height == e->height && i < 3 && m->fps[i]) {
				e->type = V4L2_FRMIVAL_TYPE_DISCRETE;
				e->discrete = (struct v4l2_fract){10, m->fps[i]};
				return 0;
			}
		return -EINVAL;
	}
	return -ENOTTY;
}

/* answer does the ioctl for the thread that called it. */
static int answer(const struct seccomp_notif *call)
{
	unsigned long request = (__u32)call->data.args[1];
	char link[64], path[4096] = "", arg[256];
	struct iovec here = {arg, _IOC_SIZE(request)}, there = {(void *)call->data.args[2], _IOC_SIZE(request)};

	snprintf(link, sizeof link, "/proc/%u/fd/%u", call->pid, (__u32)call->data.args[0]);
	if (readlink(link, path, sizeof path - 1) < 0)
		return -EBADF;
	for (const struct node *n = nodes; n < nodes + sizeof nodes / sizeof *nodes; n++) {
		if (strcmp(strrchr(path, '/') + 1, n->name))
			continue;
		if (here.iov_len > sizeof arg || process_vm_readv(call->pid, &here, 1, &there, 1, 0) != (ssize_t)here.iov_len)
			return -EFAULT;
		int error = query(n, request, arg);
		if (!error && process_vm_writev(call->pid, &here, 1, &there, 1, 0) != (ssize_t)here.iov_len)
			return -EFAULT;
		return error;
	}
	return -ENOTTY;
}

int main(int argc, char **argv)
{
	must(argc > 2, "arguments");
	int tell[2], go[2], calls, status;
	must(pipe(tell) == 0 && pipe(go) == 0, "pipe");
	pid_t child = fork();
	must(child >= 0, "fork");
	if (child == 0) {
		struct sock_filter video[] = { /* the ioctls of 'V' */
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 4),
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])), /* little-endian */
			BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xff00),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 'V' << 8, 0, 1),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		};
		struct sock_fprog filter = {sizeof video / sizeof *video, video};
		if (geteuid() != 0)
			must(unshare(CLONE_NEWUSER) == 0, "unshare");
		must(chroot(argv[1]) == 0 && chdir("/") == 0, argv[1]);
		if (geteuid() == 0)
			must(setgid(65534) == 0 && setuid(65534) == 0, "setuid");
		must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
		calls = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &filter);
		must(calls >= 0, "seccomp");
		must(write(tell[1], &calls, sizeof calls) == sizeof calls, "write");
		close(go[1]);
		must(read(go[0], &status, 1) == 0, "read"); /* until our end of it is closed */
		execv(argv[2], argv + 2);
		must(0, argv[2]);
	}
	close(tell[1]);
	must(read(tell[0], &calls, sizeof calls) == sizeof calls, "the program");
	int pidfd = syscall(SYS_pidfd_open, child, 0);
	must(pidfd >= 0, "pidfd_open");
	calls = syscall(SYS_pidfd_getfd, pidfd, calls, 0);
	must(calls >= 0, "pidfd_getfd");
	close(go[1]);
	for (struct pollfd p = {calls, POLLIN, 0}; poll(&p, 1, -1) == 1 && p.revents & POLLIN;) {
		struct seccomp_notif call = {0};
		struct seccomp_notif_resp reply = {0};
		if (ioctl(calls, SECCOMP_IOCTL_NOTIF_RECV, &call) < 0)
			continue; /* a signal took it back */
		reply.id = call.id;
		reply.error = answer(&call);
		ioctl(calls, SECCOMP_IOCTL_NOTIF_SEND, &reply);
	}
	must(waitpid(child, &status, 0) == child, "wait");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 98;
}
