#!/usr/bin/env python3
"""Looks at an MPEG transport stream as ISO 13818-1 sees it, and prints what it
found as JSON. It shares no line with vw, so that its tests can believe it.

    tscheck.py FILE [--index FILE [--conn N]]

The index is the one of testdata/relay: a line per message with connection,
offset, length, arrival in unix nanoseconds and type. With it, intervals are
also given without the times in which nothing came ("flow").

Positions are numbers of packets. Times are in milliseconds, but for PTS, DTS
and PCR themselves, which are in ticks of 90 kHz, unwrapped. The status is 1
when there are errors, which are listed under that name.
"""

import argparse
import bisect
import hashlib
import json
import sys

PACKET = 188
NULL = 0x1FFF
WRAP = 1 << 33
MOST = 50  # errors of one kind that are listed
FRAME = 45  # ms; a silence is longer


def make_crc_table():
    table = []
    for i in range(256):
        c = i << 24
        for _ in range(8):
            c = (c << 1) ^ (0x04C11DB7 if c & 0x80000000 else 0)
        table.append(c & 0xFFFFFFFF)
    return table


CRC = make_crc_table()


def crc32(data):
    """CRC of annex A; 0 over a section with its right CRC."""
    c = 0xFFFFFFFF
    for b in data:
        c = ((c << 8) & 0xFFFFFFFF) ^ CRC[(c >> 24) ^ b]
    return c


def unwrap(value, last):
    """The value nearest to last that is equal to value modulo 2^33."""
    if last is None:
        return value
    d = (value - last) % WRAP
    return last + (d - WRAP if d >= WRAP // 2 else d)


def timestamp(b):
    """PTS or DTS, with the marker bits checked."""
    if not (b[0] & 1 and b[2] & 1 and b[4] & 1):
        return None
    return (b[0] >> 1 & 7) << 30 | b[1] << 22 | b[2] >> 1 << 15 | b[3] << 7 | b[4] >> 1


class Sections:
    """Puts the sections of one PID together. 2.4.4.1."""

    def __init__(self):
        self.buf = None
        self.start = 0

    def add(self, at, start, payload):
        if start:
            pointer = payload[0]
            if self.buf is not None:
                self.buf += payload[1 : 1 + pointer]
                yield from self.whole()
            self.buf, self.start = bytearray(payload[1 + pointer :]), at
        elif self.buf is not None:
            self.buf += payload
        yield from self.whole()

    def whole(self):
        while self.buf is not None and len(self.buf) >= 3:
            if self.buf[0] == 0xFF:  # stuffing to the end
                self.buf = None
                return
            n = 3 + ((self.buf[1] & 0x0F) << 8 | self.buf[2])
            if len(self.buf) < n:
                return
            section, self.buf = bytes(self.buf[:n]), self.buf[n:]
            yield self.start, section


class Pid:
    """What is known of one PID."""

    def __init__(self):
        self.packets = 0
        self.payloads = 0
        self.cc = None
        self.last = None  # last packet with a payload
        self.twice = False  # it came twice already
        self.continuity = []
        self.duplicates = 0
        self.discontinuities = []
        self.random_access = 0
        # PES
        self.pes = 0
        self.starts = []
        self.buf = None
        self.pts = self.dts = None
        self.first_pts = self.first_dts = None
        self.pts_back = []
        self.dts_back = []
        self.dts_pcr = None
        self.hash = hashlib.sha256()
        self.delays = hashlib.sha256()
        self.es_bytes = 0


class Check:
    def __init__(self, data, arrivals):
        self.data = data
        self.arrivals = arrivals
        self.errors = []
        self.kinds = {}
        self.pids = {}
        self.sections = {0: Sections()}
        self.section_count = self.crc_errors = 0
        self.pat = None
        self.pat_at = []
        self.pmt_pid = None
        self.pmt_at = []
        self.pmt = None  # in force: version, body
        self.tracks = {}  # in force: PID to stream_type
        self.pmts = []
        self.version_errors = []
        self.pcr_pid = None
        self.pcrs = []  # position, value in 27 MHz
        self.pcr_back = []

    def error(self, kind, at, text):
        n = self.kinds.get(kind, 0)
        self.kinds[kind] = n + 1
        if n < MOST:
            self.errors.append(f"{kind} at packet {at}: {text}")

    def run(self):
        count = len(self.data) // PACKET
        if len(self.data) % PACKET:
            self.error("part of a packet", count, f"{len(self.data) % PACKET} bytes at the end")
        for at in range(count):
            self.packet(at, self.data[at * PACKET : (at + 1) * PACKET])
        for number, pid in self.pids.items():
            self.finish_pes(number, pid, count)
        if not self.pat_at:
            self.error("no PAT", 0, "in the whole file")
        if not self.pmts:
            self.error("no PMT", 0, "in the whole file")
        if not self.pcrs:
            self.error("no PCR", 0, "in the whole file")

    def packet(self, at, p):
        if p[0] != 0x47:
            self.error("sync", at, f"the byte is {p[0]:#x}")
            return
        number = (p[1] & 0x1F) << 8 | p[2]
        if number == NULL:
            return
        start, cc, control = p[1] & 0x40, p[3] & 0x0F, p[3] >> 4 & 3
        if p[1] & 0x80:
            self.error("transport_error_indicator", at, f"PID {number:#x}")
        if p[3] & 0xC0:
            self.error("scrambled", at, f"PID {number:#x}")
        if control == 0:
            self.error("adaptation_field_control", at, f"PID {number:#x}: it is 0")
            return
        pid = self.pids.setdefault(number, Pid())
        pid.packets += 1
        field, payload = b"", p[4:]
        if control & 2:
            n = p[4]
            if control == 2 and n != 183 or control == 3 and n > 182:
                self.error("adaptation_field_length", at, f"PID {number:#x}: {n}")
                return
            field, payload = p[5 : 5 + n], p[5 + n :]
        if not control & 1:
            payload = None
        known = number in (0, self.pmt_pid, self.pcr_pid) or number in self.tracks
        if not known:
            self.error("unlisted PID", at, f"PID {number:#x} is in no PMT in force")
        discontinuity = bool(field) and bool(field[0] & 0x80)
        if discontinuity:
            pid.discontinuities.append(at)
        if field and field[0] & 0x40:
            pid.random_access += 1
        if not self.counter(at, number, pid, p, cc, payload is not None, discontinuity):
            return
        if field and field[0] & 0x10:
            self.pcr(at, number, field)
        if payload is None:
            return
        pid.payloads += 1
        if number in self.sections:
            if start and payload[0] > len(payload) - 1:
                self.error("pointer_field", at, f"PID {number:#x}: {payload[0]}")
                return
            for begin, section in self.sections[number].add(at, start, payload):
                self.section(begin, number, section)
            return
        if number not in self.tracks:
            return
        if start:
            self.finish_pes(number, pid, at)
            pid.pes += 1
            pid.starts.append(at)
            pid.buf = bytearray()
        elif pid.buf is None:
            self.error("no PES", at, f"PID {number:#x}: its bytes belong to no PES")
            return
        pid.buf += payload

    def counter(self, at, number, pid, p, cc, has_payload, discontinuity):
        """Checks continuity_counter; False for a packet sent twice. 2.4.3.3."""
        last, pid.cc = pid.cc, cc
        previous, twice = pid.last, pid.twice
        if has_payload:
            pid.last, pid.twice = p, False
        if last is None or discontinuity:
            return True
        if not has_payload:
            if cc != last:
                pid.continuity.append(at)
                self.error("continuity", at, f"PID {number:#x}: {cc} without payload after {last}")
            return True
        if cc == (last + 1) & 15:
            return True
        if cc == last and previous is not None and not twice and self.same(p, previous):
            pid.duplicates += 1
            pid.twice = True
            return False
        pid.continuity.append(at)
        self.error("continuity", at, f"PID {number:#x}: {cc} after {last}")
        return True

    @staticmethod
    def same(a, b):
        """Whether b is a again; a PCR may differ."""
        if a[3] & 0x20 and a[4] >= 7 and a[5] & 0x10:
            return a[:6] == b[:6] and a[12:] == b[12:]
        return a == b

    def pcr(self, at, number, field):
        if number != self.pcr_pid:
            self.error("PCR elsewhere", at, f"PID {number:#x}, but the PMT says {self.pcr_pid}")
            return
        base = field[1] << 25 | field[2] << 17 | field[3] << 9 | field[4] << 1 | field[5] >> 7
        extension = (field[5] & 1) << 8 | field[6]
        if extension >= 300:
            self.error("PCR extension", at, str(extension))
        last = self.pcrs[-1][1] if self.pcrs else None
        base = unwrap(base, None if last is None else last // 300)
        value = base * 300 + extension
        if last is not None and value <= last:
            self.pcr_back.append(at)
            self.error("PCR goes back", at, f"by {(last - value) / 27000:.3f} ms")
        self.pcrs.append((at, value))

    def section(self, at, number, s):
        self.section_count += 1
        if crc32(s):
            self.crc_errors += 1
            self.error("CRC", at, f"PID {number:#x}: section of {len(s)} bytes")
            return
        if number == 0:
            if s[0] != 0:
                self.error("table_id", at, f"{s[0]:#x} in the PAT's PID")
                return
            self.pat_at.append(at)
            if s[:-4] == self.pat:
                return
            if self.pat is not None:
                if s[8:-4] == self.pat[8:]:
                    self.error("PAT version", at, "it changed, and the content did not")
                elif s[5] == self.pat[5]:
                    self.error("PAT version", at, "it did not change, and the content did")
            self.pat = s[:-4]
            programs = [(s[i] << 8 | s[i + 1], (s[i + 2] & 0x1F) << 8 | s[i + 3]) for i in range(8, len(s) - 4, 4)]
            programs = [x for x in programs if x[0] != 0]
            if len(programs) != 1:
                self.error("PAT", at, f"{len(programs)} programs")
            if programs and programs[0][1] != self.pmt_pid:
                self.pmt_pid = programs[0][1]
                self.sections = {0: self.sections[0], self.pmt_pid: Sections()}
            return
        if s[0] != 2:
            self.error("table_id", at, f"{s[0]:#x} in the PMT's PID")
            return
        self.pmt_at.append(at)
        version, body = s[5] >> 1 & 31, s[:5] + bytes([s[5] & 0xC1]) + s[6:-4]
        if not s[5] & 1 or s[6] or s[7]:
            self.error("PMT", at, "it is not current, or has several sections")
        if self.pmt == (version, body):
            return
        if self.pmt is not None:
            if self.pmt[1] == body:
                self.version_errors.append({"packet": at, "what": "the version changed, and the content did not"})
            elif self.pmt[0] == version:
                self.version_errors.append({"packet": at, "what": "the content changed, and the version did not"})
            elif version != (self.pmt[0] + 1) & 31:
                self.version_errors.append({"packet": at, "what": f"version {version} after {self.pmt[0]}"})
            if self.version_errors and self.version_errors[-1]["packet"] == at:
                self.error("PMT version", at, self.version_errors[-1]["what"])
        self.pmt = (version, body)
        self.pcr_pid = (s[8] & 0x1F) << 8 | s[9]
        i = 12 + ((s[10] & 0x0F) << 8 | s[11])
        tracks, end = [], len(s) - 4
        while i + 5 <= end:
            n = (s[i + 3] & 0x0F) << 8 | s[i + 4]
            tracks.append({
                "pid": (s[i + 1] & 0x1F) << 8 | s[i + 2],
                "type": s[i],
                "descriptors": s[i + 5 : i + 5 + n].hex(),
            })
            i += 5 + n
        if i != end:
            self.error("PMT", at, "its loop does not end where the section does")
        self.tracks = {t["pid"]: t["type"] for t in tracks}
        if len(self.tracks) != len(tracks):
            self.error("PMT", at, "a PID is in it twice")
        for t in tracks:
            if t["pid"] in (0, self.pmt_pid, NULL) or t["pid"] < 0x10:
                self.error("PMT", at, f"a track on PID {t['pid']:#x}")
        self.pmts.append({"packet": at, "version": version, "pcr_pid": self.pcr_pid, "tracks": tracks})

    def finish_pes(self, number, pid, at):
        """Looks at a whole PES, its header in particular. 2.4.3.6."""
        b, pid.buf = pid.buf, None
        if b is None:
            return
        begin = pid.starts[-1]
        if b[:3] != b"\0\0\1" or len(b) < 9 or b[6] & 0xC0 != 0x80 or len(b) < 9 + b[8]:
            self.error("PES header", begin, f"PID {number:#x}: {b[:9].hex()}")
            return
        size = b[4] << 8 | b[5]
        if size and size + 6 != len(b):
            self.error("PES length", begin, f"PID {number:#x}: {len(b)} bytes, and it says {size + 6}")
        if not size and not 0xE0 <= b[3] <= 0xEF:
            self.error("PES length", begin, f"PID {number:#x}: 0 in what is not video")
        pts = dts = None
        if b[7] & 0x80:
            pts = timestamp(b[9:14])
            b[9:14] = b"\0\0\0\0\0"
            if b[7] & 0x40:
                dts = timestamp(b[14:19])
                b[14:19] = b"\0\0\0\0\0"
            else:
                dts = pts
            if pts is None or dts is None:
                self.error("PES header", begin, f"PID {number:#x}: marker bits of a timestamp")
                return
        pid.hash.update(b)
        pid.es_bytes += len(b) - 9 - b[8]
        if pts is None:
            pid.delays.update(b"none ")
            return
        pid.delays.update(b"%d " % ((pts - dts) % WRAP))
        last = self.pcrs[0][1] // 300 if self.pcrs else None
        dts = unwrap(dts, pid.dts if pid.dts is not None else last)
        pts = unwrap(pts, dts)
        if pid.pts is None:
            pid.first_pts, pid.first_dts = pts, dts
        else:
            if pts <= pid.pts:
                pid.pts_back.append(begin)
            if dts <= pid.dts:
                pid.dts_back.append(begin)
                self.error("DTS goes back", begin, f"PID {number:#x}: by {(pid.dts - dts) / 90:.1f} ms")
        pid.pts, pid.dts = max(pts, pid.pts or 0), dts
        i = bisect.bisect(self.pcrs, (begin, 0)) - 1
        if i >= 0:
            ahead = (dts * 300 - self.pcrs[i][1]) / 27000
            low, high = pid.dts_pcr or (ahead, ahead)
            pid.dts_pcr = (min(low, ahead), max(high, ahead))

    def near(self, at):
        """The value of the PCR nearest to a packet, in ms."""
        i = bisect.bisect(self.pcrs, (at, 0))
        best = min(self.pcrs[max(0, i - 1) : i + 1], key=lambda x: abs(x[0] - at))
        return best[1] / 27000

    def gaps(self, at):
        """The longest time between two of these packets: at all, and without
        the times in which nothing came."""
        gaps = {"count": len(at), "max_ms": 0, "at": 0, "flow_max_ms": 0, "flow_at": 0}
        if not self.pcrs:
            return gaps
        for a, b in zip(at, at[1:]):
            ms = self.near(b) - self.near(a)
            flow = ms
            if ms > 100.001:
                flow -= self.silence(a, b)
            if ms > gaps["max_ms"]:
                gaps["max_ms"], gaps["at"] = ms, a
            if flow > gaps["flow_max_ms"]:
                gaps["flow_max_ms"], gaps["flow_at"] = flow, a
        return gaps

    def silence(self, a, b):
        """For how long nothing came between two packets, beyond the time
        between two frames at 25 a second."""
        first = bisect.bisect(self.arrivals, (a * PACKET, float("inf"))) - 1
        last = bisect.bisect(self.arrivals, (b * PACKET, float("inf"))) - 1
        at = [t / 1e6 for _, t in self.arrivals[max(first, 0) : last + 1]]
        return sum(max(0, y - x - FRAME) for x, y in zip(at, at[1:]))

    def report(self):
        pids = {}
        for number, pid in sorted(self.pids.items()):
            pids[f"{number:#x}"] = {
                "packets": pid.packets,
                "payloads": pid.payloads,
                "continuity_errors": pid.continuity,
                "duplicates": pid.duplicates,
                "discontinuity_indicators": pid.discontinuities,
                "random_access": pid.random_access,
                "pes": pid.pes,
                "es_bytes": pid.es_bytes,
                # every PES byte but PTS and DTS; and PTS - DTS of each
                "pes_sha256": pid.hash.hexdigest(),
                "delays_sha256": pid.delays.hexdigest(),
                "first_pts": pid.first_pts,
                "last_pts": pid.pts,
                "first_dts": pid.first_dts,
                "last_dts": pid.dts,
                "pts_back": pid.pts_back,  # B-frames do that too
                "dts_back": pid.dts_back,
                "dts_pcr_ms": pid.dts_pcr,
            }
        return {
            "bytes": len(self.data),
            "packets": len(self.data) // PACKET,
            "sections": self.section_count,
            "crc_errors": self.crc_errors,
            "pat": self.gaps(self.pat_at),
            "pmt": self.gaps(self.pmt_at),
            "pcr": dict(self.gaps([at for at, _ in self.pcrs]), pid=self.pcr_pid, back=self.pcr_back),
            "pmts": self.pmts,
            "version_errors": self.version_errors,
            "pids": pids,
            "errors": self.errors,
            "error_counts": self.kinds,
        }


def main():
    args = argparse.ArgumentParser(description="checks an MPEG transport stream")
    args.add_argument("file")
    args.add_argument("--index", help="index of testdata/relay")
    args.add_argument("--conn", type=int, default=1, help="connection in the index")
    args = args.parse_args()
    with open(args.file, "rb") as f:
        data = f.read()
    arrivals = []
    if args.index:
        with open(args.index) as f:
            for line in f:
                conn, offset, _, at, _ = line.split()
                if int(conn) == args.conn:
                    arrivals.append((int(offset), int(at)))
    check = Check(data, arrivals)
    check.run()
    json.dump(check.report(), sys.stdout, indent=1)
    print()
    return 1 if check.errors else 0


if __name__ == "__main__":
    sys.exit(main())
