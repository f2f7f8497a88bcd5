package sanitytests

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// evict wishes that a disk is emptied, or a whole node where no disk is named, or takes the wish back.
func evict(t *testing.T, i *instance, node, disk string, wished bool) {
	t.Helper()
	mustPut(t, i, "node", node, func(o map[string]any) {
		what := spec(o)
		if disk != "" {
			what = what["disks"].(map[string]any)[disk].(map[string]any)
		}
		what["allowScheduling"], what["evictionRequested"] = !wished, wished
	})
}

// untilAt waits until the only copy of an image is ready on one of some disks, and no file of it is anywhere else.
func untilAt(t *testing.T, i *instance, image string, labels ...string) string {
	t.Helper()
	untilCopies(t, i, image, 1)
	eventually(t, 20*time.Second, fmt.Sprintf("image %s is on one of %v", image, labels), func() (bool, string) {
		held := disksOf(t, i, image)
		return len(held) == 1 && slices.Contains(labels, held[0]), fmt.Sprint(held)
	})
	return disksOf(t, i, image)[0]
}

// nothingIsFlagged waits until an eviction that was taken back is left nowhere in an image: neither in its wishes nor in what it says.
func nothingIsFlagged(t *testing.T, i *instance, image string) {
	t.Helper()
	until(t, i, 20*time.Second, "backingimage", image, "nothing of an eviction is left", func(o imageObject) bool {
		wishes, _ := json.Marshal(o.Spec.DiskFileSpecMap)
		return conditionOf(o.Status.Conditions, "Evicted").Type == "" && !strings.Contains(string(wishes), `"evictionRequested":true`)
	})
}

// The only copy of an image moves from a disk to another one of the node, and from a node to another one: it is there first and
// goes from where it was then. No other manager notices, and what is cancelled leaves nothing flagged.
func TestAnEvictedCopyIsElsewhereBeforeItGoes(t *testing.T) {
	i := ownInstance(t, 2, "--disks-per-node", "2")
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	i.apply(t, imageYAML("bystander", url, image.checksum, 1)+"  nodeSelector: [node-2]\n  diskSelector: [disk-2]\n")
	removeImage(t, i, "bystander")
	untilImageReady(t, i, "bystander")
	other := agents(i, i.path("nodes", "node-2", "disk-2"), diskUUID(t, i.path("nodes", "node-2", "disk-2")))
	if len(other) != 1 {
		t.Fatalf("want one agent of the disk that is not touched: %v", other)
	}
	yaml := imageYAML("moving", url, image.checksum, 1)
	i.apply(t, yaml+"  nodeSelector: [node-1]\n")
	removeImage(t, i, "moving")
	from := untilAt(t, i, "moving", "node-1/disk-1", "node-1/disk-2")
	eachVersion(t, i, "backingimage", "moving", func(o imageObject) {
		if len(readyCopies(o)) == 0 && o.Metadata.DeletionTimestamp == "" {
			t.Errorf("there was no ready copy for a while: %+v", o.Status)
		}
	})

	first, second := "disk-1", "disk-2"
	if from == "node-1/disk-2" {
		first, second = second, first
	}
	evict(t, i, "node-1", first, true)
	untilAt(t, i, "moving", "node-1/"+second)
	evict(t, i, "node-1", first, false)

	i.apply(t, yaml+"  nodeSelector: []\n")
	evict(t, i, "node-1", "", true)
	untilAt(t, i, "moving", "node-2/disk-1", "node-2/disk-2")
	evict(t, i, "node-1", "", false)
	for _, path := range copyPaths(i, "moving", get[imageObject](t, i, "backingimage", "moving").Status.UUID) {
		if got := checksumOf(t, path); got != image.checksum {
			t.Errorf("%s: SHA-512 %s", path, got)
		}
	}
	nothingIsFlagged(t, i, "moving")
	noTemporaryFiles(t, i, "moving")
	now := agents(i, i.path("nodes", "node-2", "disk-2"), diskUUID(t, i.path("nodes", "node-2", "disk-2")))
	if len(now) != 1 || now[0].pid != other[0].pid {
		t.Errorf("the manager of another disk was started anew: %v, then %v", other, now)
	}
}

// A copy that has nowhere to go stays and says why, in its image, in `why` and as an event, and goes as soon as it may. Whoever takes
// the request back meanwhile finds everything as it was.
func TestACopyThatCannotBeEvictedStaysAndSaysWhy(t *testing.T) {
	i := ownInstance(t, 2)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	yaml := imageYAML("staying", url, image.checksum, 1)
	i.apply(t, yaml+"  nodeSelector: [node-1]\n")
	removeImage(t, i, "staying")
	untilAt(t, i, "staying", "node-1/disk-1")
	file := func() map[string]uint64 {
		return inodes(t, copyPaths(i, "staying", get[imageObject](t, i, "backingimage", "staying").Status.UUID))
	}
	first := file()
	disk := diskUUID(t, i.path("nodes", "node-1", "disk-1"))
	mayMove := eachVersion(t, i, "backingimage", "staying", func(o imageObject) {
		if ready := readyCopies(o); !slices.Equal(ready, []string{disk}) || len(o.Spec.DiskFileSpecMap) != 1 {
			t.Errorf("want the one copy where it was: %+v of %+v", o.Status.DiskFileStatusMap, o.Spec.DiskFileSpecMap)
		}
	})
	parts := []string{"disk-1 of node-1 stays, although eviction is requested", "lacks the tag `node-1`"}
	saysWhy := func() {
		t.Helper()
		evict(t, i, "node-1", "", true)
		until(t, i, 20*time.Second, "backingimage", "staying", "says why its copy stays", func(o imageObject) bool {
			return says(conditionOf(o.Status.Conditions, "Evicted").Message, parts)
		})
	}
	saysWhy()
	mentions(t, "why", i.why("image", "staying"), parts...)
	eventually(t, 20*time.Second, "an event says so", func() (bool, string) {
		events := i.cli(t, "get", "events", "-A")
		for line := range strings.Lines(events) {
			if says(line, append([]string{"Warning", "backingimage/staying"}, parts...)) {
				return true, ""
			}
		}
		return false, events
	})

	evict(t, i, "node-1", "", false)
	nothingIsFlagged(t, i, "staying")
	if why := i.why("image", "staying") + i.why("node", "node-1"); says(why, []string{"eviction is requested"}) {
		t.Errorf("why still tells of it: %s", why)
	}
	saysWhy()
	if now := file(); len(first) != 1 || !maps.Equal(first, now) {
		t.Errorf("want the one file as it was: %v, then %v", first, now)
	}
	mayMove()
	i.apply(t, yaml+"  nodeSelector: []\n")
	untilAt(t, i, "staying", "node-2/disk-1")
	evict(t, i, "node-1", "", false)
	nothingIsFlagged(t, i, "staying")
}
