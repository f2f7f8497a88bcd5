package sanitytests

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// clock is what an instance takes for the time of day; monotonic clocks and times of files stay as they are, as on a machine whose
// clock is set.
type clock struct{ file string }

// set puts it so far from the true time, in one step.
func (c clock) set(t *testing.T, offset time.Duration) {
	t.Helper()
	next := c.file + ".next"
	if err := os.WriteFile(next, fmt.Appendf(nil, "%+d\n", int(offset.Seconds())), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, c.file); err != nil {
		t.Fatal(err)
	}
}

// withClock is an instance with a clock of its own.
func withClock(t *testing.T, nodes int) (*instance, clock) {
	t.Helper()
	libraries, _ := filepath.Glob("/usr/lib/*/faketime/libfaketime.so.1")
	if len(libraries) != 1 {
		t.Fatalf("package libfaketime is missing: %v", libraries)
	}
	program, err := programUnderTest()
	if err != nil {
		t.Fatal(err)
	}
	c := clock{file: filepath.Join(t.TempDir(), "clock")}
	c.set(t, 0)
	env := []string{
		"LD_PRELOAD=" + libraries[0], "FAKETIME_TIMESTAMP_FILE=" + c.file, "FAKETIME_NO_CACHE=1",
		"FAKETIME_DONT_FAKE_MONOTONIC=1", "FAKETIME_DONT_RESET=1", "NO_FAKE_STAT=1",
	}
	i, err := startInstanceIn(env, program, nodes)
	if err != nil {
		t.Fatalf("cannot start an instance: %v", err)
	}
	pid := i.daemon.Process.Pid
	t.Cleanup(func() {
		// What the library shares between processes outlives one that is killed.
		left, _ := filepath.Glob(fmt.Sprintf("/dev/shm/*faketime_*_%d", pid))
		for _, path := range left {
			os.Remove(path)
		}
	})
	i.endWith(t)
	return i, c
}

// A clock that is set, far ahead and then far back, is told by its node and of what waits; copies stay as they are, a mounted volume
// goes on, and nothing waits for a time that a wrong clock had set.
func TestAClockThatIsSetIsToldAndHoldsNothingUp(t *testing.T) {
	i, c := withClock(t, 2)
	volume, _, w, _ := mountedVolume(t, i, "clocked", 2)
	image := ext4Image(t, 16)
	var healed atomic.Bool
	url, _ := sourceServer(t, func(rw http.ResponseWriter, r *http.Request) {
		if healed.Load() {
			http.ServeFile(rw, r, image.path)
		} else {
			rw.WriteHeader(http.StatusInternalServerError)
		}
	})
	uuid := get[imageObject](t, i, "backingimage", "clocked").Status.UUID
	until(t, i, 30*time.Second, "backingimage", "clocked", "has both copies", func(o imageObject) bool { return len(readyCopies(o)) == 2 })
	before := inodes(t, copyPaths(i, "clocked", uuid))
	removeImage(t, i, "later")
	i.apply(t, imageYAML("later", url+"/image.raw", image.checksum, 1))
	for _, step := range []struct {
		offset time.Duration
		said   string
	}{
		{24 * time.Hour, "set ahead by 86400 s"},
		{-24 * time.Hour, "set back by 172800 s"},
	} {
		c.set(t, step.offset)
		for _, node := range []string{"node-1", "node-2"} {
			until(t, i, namedWithin, "node", node, "says "+step.said, func(o nodeObject) bool {
				steady := conditionOf(o.Status.Conditions, "ClockSteady")
				return steady.Status == "False" && says(steady.Message, []string{node, step.said})
			})
			mentions(t, "why node", i.why("node", node), step.said)
		}
		mentions(t, "why of what waits", i.why("backingimage", "later"), "answered 500", step.said)
		mentions(t, "why of a volume", i.why("volume", volume), step.said)
		w.goesOn(t, 50)
		// All is looked at once more by the new time.
		until(t, i, healedWithin, "backingimage", "later", "is tried again", func(o imageObject) bool {
			retry, err := time.Parse(time.RFC3339Nano, conditionOf(o.Status.Conditions, "Ready").NextRetryTime)
			return err == nil && time.Until(retry).Abs() > step.offset.Abs()-time.Hour && (time.Until(retry) > 0) == (step.offset > 0)
		})
		if after := inodes(t, copyPaths(i, "clocked", uuid)); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("copies were made anew: %v, before %v", after, before)
		}
		untilRobust(t, i, volume, "healthy")
	}
	healed.Store(true)
	until(t, i, healedWithin, "backingimage", "later", "is ready", func(o imageObject) bool {
		return conditionOf(o.Status.Conditions, "Ready").Status == "True"
	})
	w.finish(t)
}

// inodes are those of files, by path.
func inodes(t *testing.T, paths []string) map[string]uint64 {
	t.Helper()
	found := map[string]uint64{}
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		found[path] = info.Sys().(*syscall.Stat_t).Ino
	}
	return found
}
