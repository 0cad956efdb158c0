// Figures: what runs and how it does, as JSON and for Prometheus.
//
// The data path only adds to counters that it owns or has locked anyway;
// whoever asks takes short looks at them, one lock at a time.

package main

import (
	"fmt"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"runtime/pprof"
	"slices"
	"strconv"
	"sync"
	"time"
)

// stats is everything there is to know, as GET /api/stats has it. Rates are
// per second, times in seconds, sizes in bytes.
type stats struct {
	Version      string                       `json:"version"`
	Uptime       float64                      `json:"uptime"`
	Goroutines   int                          `json:"goroutines"`
	Heap         uint64                       `json:"heap"`
	Descriptors  int                          `json:"descriptors"` // -1: not known here
	Mute         muteStatus                   `json:"mute"`
	Feeds        map[string]*feedStats        `json:"feeds"`
	Streams      map[string]*streamStats      `json:"streams"`
	Destinations map[string]*destinationStats `json:"destinations"`
}

// newStats looks at everything but the control link, one thing after the other.
func newStats(started time.Time, r *rules) stats {
	now := time.Now()
	heap := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(heap)
	all := stats{
		Version: version(), Uptime: now.Sub(started).Seconds(), Goroutines: runtime.NumGoroutine(),
		Heap: heap[0].Value.Uint64(), Descriptors: descriptors(),
		Destinations: r.destinationStats(now),
	}
	all.Mute, all.Mute.Since = r.muteStatus(handHere)
	all.Feeds, all.Streams = r.mux.stats(now)
	for _, d := range all.Destinations {
		d.Problem = all.problem(d.Stream)
	}
	return all
}

// problem says why a destination of source has nothing to send, though its
// connection is open; "" when that is not so.
func (all stats) problem(source string) string {
	feed, stream := all.Feeds[source], all.Streams[source]
	switch {
	case isStream(source) && stream == nil:
		return "no such stream"
	case isStream(source) && len(stream.Feeds) == 0:
		return "the stream has no feeds"
	case isStream(source) && len(stream.Present) == 0:
		return "nobody publishes a feed of the stream"
	case !isStream(source) && (feed == nil || feed.Publisher == nil):
		return "nobody publishes the feed"
	case isStream(source) && all.mutes(stream.Present) || !isStream(source) && all.mutes([]string{source}):
		return "all of it is muted"
	}
	return ""
}

// mutes reports whether the mute switch leaves nothing of what feeds have: while one
// kind is muted only what is known to be of the other goes out.
func (all stats) mutes(feeds []string) bool {
	goesOut := map[string]bool{soundTrack.String(): !all.Mute.Audio, pictureTrack.String(): !all.Mute.Video}
	return (all.Mute.Audio || all.Mute.Video) && !slices.ContainsFunc(feeds, func(f string) bool {
		return slices.ContainsFunc(all.Feeds[f].Tracks, func(t trackStats) bool { return goesOut[t.Kind] })
	})
}

// version is what go build knows of the source.
var version = sync.OnceValue(func() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && v == "(devel)" {
			v = s.Value
		}
	}
	return v + " " + info.GoVersion
})

// profile writes a CPU profile of 30 s, or until stop.
func profile(name string) (stop func(), err error) {
	f, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		f.Close()
		return nil, err
	}
	end := func() {
		pprof.StopCPUProfile()
		f.Close()
	}
	t := time.AfterFunc(30*time.Second, end)
	return func() {
		if t.Stop() {
			end()
		}
	}, nil
}

// descriptors counts the open files of this process; -1 where it cannot.
func descriptors() int {
	d, err := os.Open("/proc/self/fd")
	if err != nil {
		return -1
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return -1
	}
	return len(names) - 1 // without d
}

// metrics returns all in Prometheus' text format 0.0.4.
func (all stats) metrics() []byte {
	var e exposition
	e.addProcess(all)
	e.addMutes(all.Mute)
	e.addFeeds(all.Feeds)
	e.addStreams(all.Streams)
	e.addDestinations(all.Destinations)
	return e
}

// exposition is a text of metrics.
type exposition []byte

func (e *exposition) addProcess(all stats) {
	process := func(name, kind, help string, v float64) {
		e.add(name, kind, help, "", []string{""}, func(string) float64 { return v })
	}
	e.add("vw_build_info", "gauge", "The version that runs.", "version", []string{all.Version}, func(string) float64 { return 1 })
	process("vw_uptime_seconds", "gauge", "Time since the start.", all.Uptime)
	process("vw_heap_bytes", "gauge", "Memory in objects on the heap.", float64(all.Heap))
	process("go_goroutines", "gauge", "Goroutines that exist.", float64(all.Goroutines))
	if all.Descriptors >= 0 {
		process("process_open_fds", "gauge", "Open file descriptors.", float64(all.Descriptors))
	}
}

func (e *exposition) addMutes(m muteStatus) {
	kind := "gauge"
	for i, muted := range []bool{m.Audio, m.Video} {
		hands := m.By[mediaKinds[i]]
		if muted && hands == nil {
			hands = handNames[handHere:handControl]
		}
		e.add("vw_muted", kind, "1 when the mute switch is on, by who has muted what.", `kind="`+mediaKinds[i]+`",by`, handNames,
			func(by string) float64 { return oneIf(slices.Contains(hands, by)) })
		kind = "" // goes on
	}
}

func (e *exposition) addFeeds(all map[string]*feedStats) {
	names := slices.Sorted(maps.Keys(all))
	feed := func(name, kind, help string, value func(*feedStats) float64) {
		e.add("vw_feed_"+name, kind, help, "feed", names, func(of string) float64 { return value(all[of]) })
	}
	feed("live", "gauge", "1 when the state of the feed is live; 0 also while its clock is wrong.", func(f *feedStats) float64 { return oneIf(f.State == "live") })
	feed("bytes_total", "counter", "Bytes received.", func(f *feedStats) float64 { return float64(f.Bytes) })
	feed("packets_total", "counter", "Transport packets received.", func(f *feedStats) float64 { return float64(f.Packets) })
	feed("frames_total", "counter", "Frames received, of the video if there is one.", func(f *feedStats) float64 { return float64(f.Frames) })
	feed("keyframes_total", "counter", "Keyframes received.", func(f *feedStats) float64 { return float64(f.Keyframes) })
	feed("continuity_errors_total", "counter", "Packets whose continuity counter did not go on.", func(f *feedStats) float64 { return float64(f.ContinuityErrors) })
	feed("damaged_packets_total", "counter", "Packets with transport_error_indicator.", func(f *feedStats) float64 { return float64(f.Damaged) })
	feed("clock_rate", "gauge", "How fast the publisher's clock is that is the most wrong; 1 is right.", func(f *feedStats) float64 { return f.Clock.Rate })
	feed("clock_steps_total", "counter", "Times that the timestamps of a track stepped.", func(f *feedStats) float64 { return float64(f.Clock.Steps) })
	feed("clock_outliers_total", "counter", "Timestamps that did not fit their neighbours.", func(f *feedStats) float64 { return float64(f.Clock.Outliers) })
	feed("late_total", "counter", "Frames left out of streams since they came too late.", func(f *feedStats) float64 { return float64(f.Clock.Late) })
	feed("invalid_timestamps_total", "counter", "Frames left out of streams whose PTS is before their DTS or far after it.", func(f *feedStats) float64 { return float64(f.Clock.Invalid) })
	feed("resyncs_total", "counter", "Times that the packets were lost and found again.", func(f *feedStats) float64 { return float64(f.Resyncs) })
}

func (e *exposition) addStreams(all map[string]*streamStats) {
	names := slices.Sorted(maps.Keys(all))
	stream := func(name, kind, help string, value func(*streamStats) float64) {
		e.add("vw_stream_"+name, kind, help, "stream", names, func(of string) float64 { return value(all[of]) })
	}
	stream("bytes_total", "counter", "Bytes of the program made.", func(s *streamStats) float64 { return float64(s.Bytes) })
	stream("feeds", "gauge", "Feeds in the rule.", func(s *streamStats) float64 { return float64(len(s.Feeds)) })
	stream("feeds_present", "gauge", "Feeds in the rule that somebody publishes.", func(s *streamStats) float64 { return float64(len(s.Present)) })
}

func (e *exposition) addDestinations(all map[string]*destinationStats) {
	names := slices.Sorted(maps.Keys(all))
	dest := func(name, kind, help string, value func(*destinationStats) float64) {
		e.add("vw_destination_"+name, kind, help, "destination", names, func(of string) float64 { return value(all[of]) })
	}
	dest("open", "gauge", "1 when the connection is open.", func(d *destinationStats) float64 { return oneIf(d.State == "open") })
	dest("bytes_total", "counter", "Bytes of payload delivered.", func(d *destinationStats) float64 { return float64(d.Bytes) })
	dest("messages_total", "counter", "Messages delivered.", func(d *destinationStats) float64 { return float64(d.Messages) })
	dest("frames_total", "counter", "Frames delivered.", func(d *destinationStats) float64 { return float64(d.Frames) })
	dest("reconnects_total", "counter", "Connections after the first.", func(d *destinationStats) float64 { return float64(d.Reconnects) })
	dest("queue_age_seconds", "gauge", "Age of the oldest message queued.", func(d *destinationStats) float64 { return d.QueueAge })
	dest("round_trip_seconds", "gauge", "Round trip of the last ping; 0 when not known.", func(d *destinationStats) float64 { return d.RoundTrip })
	kind := "counter"
	for _, cause := range causeNames[kept+1:] {
		e.add("vw_destination_dropped_messages_total", kind, "Messages dropped, by cause.", `cause="`+cause+`",destination`, names,
			func(of string) float64 { return float64(all[of].Dropped[cause]) })
		kind = "" // goes on
	}
}

func oneIf(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// add appends one metric, with a sample for each name; kind is "" when it was
// begun before. No name needs an escape.
func (e *exposition) add(name, kind, help, label string, names []string, value func(string) float64) {
	b := *e
	if kind != "" && len(names) > 0 {
		b = fmt.Appendf(b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
	}
	for _, of := range names {
		b = append(b, name...)
		if label != "" {
			b = append(append(append(append(append(b, '{'), label...), `="`...), of...), `"}`...)
		}
		b = append(strconv.AppendFloat(append(b, ' '), value(of), 'g', -1, 64), '\n')
	}
	*e = b
}
