// What a camera says of itself by ioctl. linux/videodev2.h
//
// The structures have fields of 1 and 4 bytes only, so they are the same on
// every architecture. The numbers are those of asm-generic/ioctl.h; mips and
// ppc64 have others.

package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"
	"strings"
	"syscall"
	"unsafe"
)

type v4l2Capability struct {
	driver       [16]byte
	card         [32]byte
	busInfo      [32]byte
	version      uint32
	capabilities uint32 // of the whole device
	deviceCaps   uint32 // of this node
	reserved     [3]uint32
}

type v4l2FmtDesc struct {
	index       uint32
	typ         uint32
	flags       uint32
	description [32]byte
	pixelFormat uint32
	mbusCode    uint32
	reserved    [3]uint32
}

// v4l2FrmSizeEnum has a union: a discrete size fills the first two sizes alone.
type v4l2FrmSizeEnum struct {
	index       uint32
	pixelFormat uint32
	typ         uint32
	sizes       [6]uint32 // least, greatest and step of the width, then of the height; or width and height
	reserved    [2]uint32
}

// v4l2FrmIvalEnum has a union: a discrete interval fills the first alone.
type v4l2FrmIvalEnum struct {
	index       uint32
	pixelFormat uint32
	width       uint32
	height      uint32
	typ         uint32
	intervals   [3][2]uint32 // shortest, longest, step; seconds as a fraction
	reserved    [2]uint32
}

const (
	iocRead, iocWrite = 2 << 30, 1 << 30

	vidiocQueryCap           = iocRead | unsafe.Sizeof(v4l2Capability{})<<16 | 'V'<<8
	vidiocEnumFmt            = iocRead | iocWrite | unsafe.Sizeof(v4l2FmtDesc{})<<16 | 'V'<<8 | 2
	vidiocEnumFrameSizes     = iocRead | iocWrite | unsafe.Sizeof(v4l2FrmSizeEnum{})<<16 | 'V'<<8 | 74
	vidiocEnumFrameIntervals = iocRead | iocWrite | unsafe.Sizeof(v4l2FrmIvalEnum{})<<16 | 'V'<<8 | 75

	v4l2CapVideoCapture     = 0x1
	v4l2CapDeviceCaps       = 0x80000000
	v4l2BufTypeVideoCapture = 1
	v4l2Discrete            = 1 // V4L2_FRMSIZE_TYPE_, V4L2_FRMIVAL_TYPE_
)

// Bounds for a driver whose lists do not end.
const (
	maxFormats   = 64
	maxSizes     = 256 // of a format
	maxIntervals = 64  // of a size
)

// queryCamera returns the name and formats of a node, or errNoCamera if it does
// not capture video. It opens the node as ffmpeg will, to learn what would keep
// ffmpeg out, and does not disturb a program that reads it.
func queryCamera(path string) (name string, formats []format, err error) {
	fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, err
	}
	defer syscall.Close(fd)
	var c v4l2Capability
	if err := ioctl(fd, vidiocQueryCap, unsafe.Pointer(&c)); err != nil {
		return "", nil, err
	}
	caps := c.capabilities
	if caps&v4l2CapDeviceCaps != 0 {
		caps = c.deviceCaps
	}
	if caps&v4l2CapVideoCapture == 0 {
		return "", nil, errNoCamera
	}
	formats = []format{}
	for i := range uint32(maxFormats) {
		d := v4l2FmtDesc{index: i, typ: v4l2BufTypeVideoCapture}
		if ioctl(fd, vidiocEnumFmt, unsafe.Pointer(&d)) != nil {
			break // the end of the list
		}
		code := binary.LittleEndian.AppendUint32(nil, d.pixelFormat)
		formats = append(formats, format{strings.TrimRight(printable(string(code)), " "), cString(d.description[:]), querySizes(fd, d.pixelFormat)})
	}
	return cString(c.card[:]), formats, nil
}

func querySizes(fd int, pixelFormat uint32) []size {
	all := []size{}
	for i := range uint32(maxSizes) {
		e := v4l2FrmSizeEnum{index: i, pixelFormat: pixelFormat}
		if ioctl(fd, vidiocEnumFrameSizes, unsafe.Pointer(&e)) != nil {
			break
		}
		s := size{Width: int(e.sizes[0]), Height: int(e.sizes[1])}
		if e.typ != v4l2Discrete {
			s = size{Width: int(e.sizes[0]), MaxWidth: int(e.sizes[1]), Height: int(e.sizes[3]), MaxHeight: int(e.sizes[4])}
		}
		w, h := s.nearest()
		s.Rates, s.AnyRate = queryRates(fd, pixelFormat, uint32(w), uint32(h))
		all = append(all, s)
		if e.typ != v4l2Discrete {
			break // it covers all sizes
		}
	}
	return all
}

// queryRates returns pictures a second, the highest first; or, if any is true,
// the highest and the lowest.
func queryRates(fd int, pixelFormat, width, height uint32) (all []float64, any bool) {
	all = []float64{}
	for i := range uint32(maxIntervals) {
		e := v4l2FrmIvalEnum{index: i, pixelFormat: pixelFormat, width: width, height: height}
		if ioctl(fd, vidiocEnumFrameIntervals, unsafe.Pointer(&e)) != nil {
			break
		}
		any = e.typ != v4l2Discrete
		n := 1
		if any {
			n = 2
		}
		for _, v := range e.intervals[:n] {
			if r := perSecond(v[0], v[1]); r > 0 {
				all = append(all, r)
			}
		}
		if any {
			break
		}
	}
	slices.SortFunc(all, func(a, b float64) int { return cmp.Compare(b, a) })
	all = slices.Compact(all)
	return all, any && len(all) == 2
}

// cString returns the printable text in b up to the first zero.
func cString(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return printable(string(b))
}
