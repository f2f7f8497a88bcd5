package sanitytests

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// moved is how many bytes the manager of a disk has received, sent and written since its process began.
type moved struct{ received, sent, written float64 }

func movedBy(t testing.TB, i *instance, disk string) moved {
	t.Helper()
	text := metricsOf(t, i, disk, "")
	count := func(name string) float64 {
		for line := range strings.Lines(text) {
			if value, found := strings.CutPrefix(line, "backing_image_csi_"+name+"_bytes_total "); found {
				number, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
				if err != nil {
					t.Fatal(err)
				}
				return number
			}
		}
		t.Fatalf("%s is not counted:\n%s", name, text)
		return 0
	}
	return moved{count("received"), count("sent"), count("written")}
}

// metricsOf is what the manager of a disk tells of itself, once it tells a line.
func metricsOf(t testing.TB, i *instance, disk, line string) (text string) {
	t.Helper()
	eventually(t, 20*time.Second, "the manager of disk "+disk+" tells "+line, func() (bool, string) {
		response, err := http.Get("http://" + managerOf(t, i, disk).Status.IP + ":8001/metrics")
		if err != nil {
			return false, err.Error()
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		text = string(body)
		return err == nil && strings.Contains(text, line), text
	})
	return text
}

// silentCopy is an image with a copy on the disk of every node, of which one falls silent.
type silentCopy struct {
	i     *instance
	name  string
	image imageFile
	file  string
	uuid  string
	info  os.FileInfo
	// before is what had been moved to and from its disk.
	before moved
}

// newSilentCopy makes the image; the copy is that on the given node.
func newSilentCopy(t *testing.T, i *instance, name string, node int) *silentCopy {
	t.Helper()
	s := &silentCopy{i: i, name: name, image: ext4Image(t, 16)}
	i.apply(t, imageYAML(name, serve(t, s.image.path)+"/"+filepath.Base(s.image.path), s.image.checksum, i.nodes))
	removeImage(t, i, name)
	object := untilCopies(t, i, name, i.nodes)
	s.file = filepath.Join(i.disk(node), "backing-images", name+"-"+object.Status.UUID, "backing")
	s.uuid = diskUUID(t, i.disk(node))
	var err error
	if s.info, err = os.Stat(s.file); err != nil {
		t.Fatal(err)
	}
	s.before = movedBy(t, i, s.uuid)
	return s
}

// saysSo waits until the copy is unknown, which removes nothing, and looks whether `why` and `image show` say since when and why.
func (s *silentCopy) saysSo(t *testing.T, why string) {
	t.Helper()
	object := until(t, s.i, 20*time.Second, "backingimage", s.name, "has an unknown copy that says "+why, func(o imageObject) bool {
		copy := o.Status.DiskFileStatusMap[s.uuid]
		return copy.State == "unknown" && strings.Contains(copy.Message, why)
	})
	if len(object.Spec.DiskFileSpecMap) != s.i.nodes || len(readyCopies(object)) != s.i.nodes-1 {
		t.Errorf("want all entries, and the others ready: %+v", object)
	}
	if ready := conditionOf(object.Status.Conditions, "Ready"); ready.Status != "True" {
		t.Errorf("an image with other copies can be used: %+v", ready)
	}
	mentions(t, "why", s.i.why("image", s.name), "is unknown.", why, "Since ")
	for line := range strings.Lines(s.i.cli(t, "image", "show", s.name)) {
		if strings.Contains(line, "unknown") {
			mentions(t, "image show", line, why, "since ")
			return
		}
	}
	t.Error("image show does not show an unknown copy")
}

// isAdopted waits until the copy is ready, as the file that it was; returns what was moved since its manager began.
func (s *silentCopy) isAdopted(t *testing.T, file string) moved {
	t.Helper()
	// The status may be that of a manager that is no more; this one says itself that it has the copy.
	metricsOf(t, s.i, s.uuid, "backing_image_csi_copies{state=\"ready\"} 1\n")
	untilCopies(t, s.i, s.name, s.i.nodes)
	info, err := os.Stat(file)
	if err != nil || !os.SameFile(info, s.info) || checksumOf(t, file) != s.image.checksum {
		t.Errorf("the copy is not the file that it was: %v", err)
	}
	return movedBy(t, s.i, s.uuid)
}

// verifiedAt is when the copy was read last.
func (s *silentCopy) verifiedAt(t *testing.T) string {
	t.Helper()
	return get[imageObject](t, s.i, "backingimage", s.name).Status.DiskFileStatusMap[s.uuid].VerifiedAt
}

// agent is the process that has the copy.
func (s *silentCopy) agent(t *testing.T) int {
	t.Helper()
	agents := agentsOf(t, s.i, s.file)
	if len(agents) != 1 {
		t.Fatalf("want one agent of %s: %v", s.file, agents)
	}
	return agents[0].pid
}

// stop lets the agent say nothing until the end of the test, or until it is told to go on.
func (s *silentCopy) stop(t *testing.T) (agent int) {
	t.Helper()
	agent = s.agent(t)
	t.Cleanup(func() { syscall.Kill(agent, syscall.SIGCONT) })
	if err := syscall.Kill(agent, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	return agent
}

// A copy whose manager or disk is away is unknown, says since when and why, and is taken as it is when that is back: nothing is
// moved. Only one whose time has changed meanwhile is read before.
func TestAnUnknownCopySaysSinceWhenAndIsAdoptedWithoutCopying(t *testing.T) {
	i := ownInstance(t, 3)
	t.Run("its manager says nothing for a while", func(t *testing.T) {
		s := newSilentCopy(t, i, "silent", 3)
		agent := s.stop(t)
		s.saysSo(t, "no answer")
		if err := syscall.Kill(agent, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		if after := s.isAdopted(t, s.file); after != s.before {
			t.Errorf("bytes were moved: %+v, then %+v", s.before, after)
		}
	})
	t.Run("its manager is killed", func(t *testing.T) {
		s := newSilentCopy(t, i, "killed", 3)
		agent := s.agent(t)
		killProcess(t, agent)
		eventually(t, 20*time.Second, "another agent is there", func() (bool, string) {
			agents := agentsOf(t, i, s.file)
			return len(agents) == 1 && agents[0].pid != agent, fmt.Sprint(agents)
		})
		if after := s.isAdopted(t, s.file); after != (moved{}) {
			t.Errorf("bytes were moved: %+v", after)
		}
		if at := s.verifiedAt(t); at != "" {
			t.Errorf("what nobody has touched was read at %s", at)
		}
	})
	t.Run("its time is another one when the manager is back", func(t *testing.T) {
		s := newSilentCopy(t, i, "touched", 2)
		agent := s.stop(t)
		s.saysSo(t, "no answer")
		if err := os.Chtimes(s.file, time.Now(), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		killProcess(t, agent)
		until(t, i, 30*time.Second, "backingimage", s.name, "has read the copy", func(o imageObject) bool {
			return o.Status.DiskFileStatusMap[s.uuid].VerifiedAt != ""
		})
		if after := s.isAdopted(t, s.file); after.received+after.sent != 0 {
			t.Errorf("bytes were moved: %+v", after)
		}
	})
	t.Run("its disk is away", func(t *testing.T) {
		s := newSilentCopy(t, i, "away", 3)
		undo := rename(t, i.disk(3))
		s.saysSo(t, "is not there")
		undo()
		if after := s.isAdopted(t, s.file); after.received != s.before.received || after.sent != s.before.sent {
			t.Errorf("bytes were moved: %+v, then %+v", s.before, after)
		}
	})
	t.Run("its disk comes back at another path", func(t *testing.T) {
		s := newSilentCopy(t, i, "migrated", 3)
		elsewhere := i.path("nodes", "node-3", "elsewhere")
		if err := os.Rename(i.disk(3), elsewhere); err != nil {
			t.Fatal(err)
		}
		s.saysSo(t, "is not there")
		move := func(path string) {
			t.Helper()
			mustPut(t, i, "node", "node-3", func(o map[string]any) {
				spec(o)["disks"].(map[string]any)["disk-1"].(map[string]any)["path"] = path
			})
		}
		move(elsewhere)
		after := s.isAdopted(t, strings.Replace(s.file, i.disk(3), elsewhere, 1))
		if after.received+after.sent != 0 {
			t.Errorf("bytes were moved: %+v", after)
		}
		if manager := managerOf(t, i, s.uuid); manager.Spec.DiskPath != elsewhere {
			t.Errorf("the manager has the disk at %s", manager.Spec.DiskPath)
		}
		if err := os.Rename(elsewhere, i.disk(3)); err != nil {
			t.Fatal(err)
		}
		move(i.disk(3))
		untilCopies(t, i, s.name, i.nodes)
	})
}

// Two of three nodes are down: their copies are unknown, the third is used, and all is as before when they are back.
func TestTwoNodesDownLeaveAnImageUsableAndComeBackAsTheyWere(t *testing.T) {
	i := ownInstance(t, 3)
	image := ext4Image(t, 16)
	volume := newClaim(t, i, "two-down", image, 32, 3, "Filesystem")
	mount := i.mountPoint(t)
	i.cli(t, "volume", "mount", "two-down", "--node", "node-1", mount)
	untilRobust(t, i, volume, "healthy")
	object := untilCopies(t, i, "two-down", 3)
	before := map[string]moved{}
	for disk := range object.Status.DiskFileStatusMap {
		before[disk] = movedBy(t, i, disk)
	}
	var stopped []int
	for _, node := range []int{2, 3} {
		agent := agentsOf(t, i, i.disk(node)+"/backing-images/")[0].pid
		t.Cleanup(func() { syscall.Kill(agent, syscall.SIGCONT) })
		if err := syscall.Kill(agent, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		stopped = append(stopped, agent)
	}
	for _, r := range replicasOf(t, i, volume) {
		if r.Spec.DiskPath != i.disk(1) {
			killStorageDaemon(t, r)
		}
	}
	untilRobust(t, i, volume, "degraded")
	until(t, i, 20*time.Second, "backingimage", "two-down", "has one ready copy and two unknown ones", func(o imageObject) bool {
		unknown := 0
		for _, copy := range o.Status.DiskFileStatusMap {
			if copy.State == "unknown" {
				unknown++
			}
		}
		return unknown == 2 && len(readyCopies(o)) == 1 && conditionOf(o.Status.Conditions, "Ready").Status == "True"
	})
	// Nothing of it is remembered from before.
	dropCaches(t)
	image.verify(t, mount)
	written := randomBytes(51, 2*mib)
	writeSynced(t, filepath.Join(mount, "written.bin"), written)
	for _, agent := range stopped {
		if err := syscall.Kill(agent, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
	}
	untilCopies(t, i, "two-down", 3)
	for disk, was := range before {
		if now := movedBy(t, i, disk); now != was {
			t.Errorf("disk %s: bytes were moved: %+v, then %+v", disk, was, now)
		}
	}
	i.cli(t, "volume", "unmount", "two-down", "--node", "node-1", mount)
	i.cli(t, "volume", "detach", "two-down")
	second := i.mountPoint(t)
	i.cli(t, "volume", "mount", "two-down", "--node", "node-2", second)
	image.verify(t, second)
	if got, err := os.ReadFile(filepath.Join(second, "written.bin")); err != nil || string(got) != string(written) {
		t.Errorf("what was written meanwhile is not there (%d bytes, %v)", len(got), err)
	}
	i.cli(t, "volume", "unmount", "two-down", "--node", "node-2", second)
	i.cli(t, "volume", "detach", "two-down")
}

// dropCaches lets the kernel forget what it has read.
func dropCaches(t testing.TB) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o200); err != nil {
		t.Logf("the page cache is kept: %v", err)
	}
}

// A disk without its configuration file has an unknown manager; one that is taken from its Node takes manager and entry along.
func TestADiskThatIsTakenFromItsNodeTakesItsManagerAlong(t *testing.T) {
	i := ownInstance(t, 2)
	s := newSilentCopy(t, i, "taken", 2)
	manager := managerOf(t, i, s.uuid).Metadata.Name
	undo := rename(t, filepath.Join(i.disk(2), "longhorn-disk.cfg"))
	s.saysSo(t, "longhorn-disk.cfg` is gone")
	until(t, i, 20*time.Second, "backingimagemanager", manager, "is unknown", func(m managerObject) bool {
		return m.Status.CurrentState == "unknown"
	})
	setSetting(t, i, "backing-image-recovery-wait-interval", "0")
	mustPut(t, i, "node", "node-2", func(o map[string]any) { delete(spec(o)["disks"].(map[string]any), "disk-1") })
	untilGone(t, i, 30*time.Second, "backingimagemanager", manager)
	object := until(t, i, 30*time.Second, "backingimage", s.name, "is without the disk", func(o imageObject) bool {
		_, wanted := o.Spec.DiskFileSpecMap[s.uuid]
		_, seen := o.Status.DiskFileStatusMap[s.uuid]
		return !wanted && !seen
	})
	if len(readyCopies(object)) != 1 {
		t.Errorf("the other copy: %+v", object.Status.DiskFileStatusMap)
	}
	undo()
}
