package sanitytests

import (
	"os"
	"path/filepath"
	"testing"
)

// A disk that was copied with its file says whose UUID it holds, and is a disk of its own once the file is removed. The one that was
// there before goes on meanwhile.
func TestACopyOfADiskSaysWhoseUUIDItHolds(t *testing.T) {
	i := ownInstance(t, 2)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	removeImage(t, i, "kept")
	i.apply(t, imageYAML("kept", url, image.checksum, 2))
	hasBoth := func(o imageObject) bool { return len(readyCopies(o)) == 2 }
	until(t, i, readyWithin, "backingimage", "kept", "has both copies", hasBoth)
	// The copy has the first name of all, and of the two on its node.
	for _, c := range []struct{ node, copy string }{{"node-1", "disk-0"}, {"node-2", "copied"}} {
		copied := filepath.Join(i.root, c.node+"-"+c.copy)
		must(t, "cp", "-a", i.disk(2), copied)
		uuid := diskUUID(t, i.disk(2))
		mustPut(t, i, "node", c.node, func(o map[string]any) {
			spec(o)["disks"].(map[string]any)[c.copy] = map[string]any{"path": copied, "allowScheduling": true, "diskType": "filesystem"}
		})
		ready := func(o nodeObject, disk string) condition {
			return conditionOf(o.Status.DiskStatus[disk].Conditions, "Ready")
		}
		until(t, i, namedWithin, "node", c.node, "says whose UUID its copied disk holds", func(o nodeObject) bool {
			copied := ready(o, c.copy)
			return copied.Status == "False" && copied.Reason == "SameUUID" && says(copied.Message, []string{uuid, "so does disk-1 of node-2"})
		})
		mentions(t, "why", i.why("node", c.node), uuid, "disk-1 of node-2", "longhorn-disk.cfg")
		if now := get[nodeObject](t, i, "node", "node-2"); ready(now, "disk-1").Status != "True" || now.Status.DiskStatus["disk-1"].DiskUUID != uuid {
			t.Errorf("the disk that was there before: %+v", now.Status.DiskStatus["disk-1"])
		}
		if now := get[imageObject](t, i, "backingimage", "kept"); !hasBoth(now) {
			t.Errorf("copies of the image: %+v", now.Status.DiskFileStatusMap)
		}
		// Also while the one that was there before is away.
		stop := eachVersion(t, i, "node", c.node, func(o nodeObject) {
			if copied := ready(o, c.copy); copied.Status == "True" {
				t.Errorf("the copy took the place of the disk: %+v", o.Status.DiskStatus)
			}
		})
		undo := rename(t, filepath.Join(i.disk(2), "longhorn-disk.cfg"))
		is := func(status string) func(o nodeObject) bool {
			return func(o nodeObject) bool { return ready(o, "disk-1").Status == status }
		}
		until(t, i, namedWithin, "node", "node-2", "says that its disk is away", is("False"))
		until(t, i, namedWithin, "node", c.node, "still says whose UUID it is", func(o nodeObject) bool { return ready(o, c.copy).Reason == "SameUUID" })
		undo()
		until(t, i, namedWithin, "node", "node-2", "has its disk again", is("True"))
		stop()
		for _, part := range []string{"longhorn-disk.cfg", "backing-images", "replicas"} {
			if err := os.RemoveAll(filepath.Join(copied, part)); err != nil {
				t.Fatal(err)
			}
		}
		until(t, i, namedWithin, "node", c.node, "has one more disk", func(o nodeObject) bool {
			own := o.Status.DiskStatus[c.copy].DiskUUID
			return ready(o, c.copy).Status == "True" && own != "" && own != uuid
		})
	}
}
