/* Prints how the kernel's headers lay out what devices_linux.go has. */
#include <linux/videodev2.h>
#include <stddef.h>
#include <stdio.h>

#define AT(s, f) printf(" %s=%zu", #f, offsetof(struct s, f))
#define SIZE(s) printf(" size=%zu\n", sizeof(struct s))

int main(void)
{
	printf("v4l2Capability %#lx", (unsigned long)VIDIOC_QUERYCAP);
	AT(v4l2_capability, driver); AT(v4l2_capability, card); AT(v4l2_capability, bus_info);
	AT(v4l2_capability, version); AT(v4l2_capability, capabilities); AT(v4l2_capability, device_caps);
	AT(v4l2_capability, reserved); SIZE(v4l2_capability);

	printf("v4l2FmtDesc %#lx", (unsigned long)VIDIOC_ENUM_FMT);
	AT(v4l2_fmtdesc, index); AT(v4l2_fmtdesc, type); AT(v4l2_fmtdesc, flags); AT(v4l2_fmtdesc, description);
	AT(v4l2_fmtdesc, pixelformat); AT(v4l2_fmtdesc, mbus_code); AT(v4l2_fmtdesc, reserved); SIZE(v4l2_fmtdesc);

	printf("v4l2FrmSizeEnum %#lx", (unsigned long)VIDIOC_ENUM_FRAMESIZES);
	AT(v4l2_frmsizeenum, index); AT(v4l2_frmsizeenum, pixel_format); AT(v4l2_frmsizeenum, type);
	AT(v4l2_frmsizeenum, stepwise); AT(v4l2_frmsizeenum, reserved); SIZE(v4l2_frmsizeenum);

	printf("v4l2FrmIvalEnum %#lx", (unsigned long)VIDIOC_ENUM_FRAMEINTERVALS);
	AT(v4l2_frmivalenum, index); AT(v4l2_frmivalenum, pixel_format); AT(v4l2_frmivalenum, width);
	AT(v4l2_frmivalenum, height); AT(v4l2_frmivalenum, type); AT(v4l2_frmivalenum, stepwise);
	AT(v4l2_frmivalenum, reserved); SIZE(v4l2_frmivalenum);
	return 0;
}
