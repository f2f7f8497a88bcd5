package sanitytests

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What an image left on a disk is told and removed although nobody remembers it: its image was deleted while the disk was away, and then
// its manager, which kept the entry. What somebody else put there is told and stays.
func TestFilesThatNobodyRemembersGoWhenTheirDiskIsBack(t *testing.T) {
	i := ownInstance(t, 3)
	image := ext4Image(t, 16)
	i.apply(t, imageYAML("forgotten", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 3))
	made := until(t, i, 30*time.Second, "backingimage", "forgotten", "has three copies", func(o imageObject) bool { return len(readyCopies(o)) == 3 })
	foreign := filepath.Join("backing-images", "my-own-thing", "notes")
	partial := filepath.Join("tmp", "forgotten-"+made.Status.UUID)
	for _, file := range []string{foreign, partial + ".tmp"} {
		path := filepath.Join(i.disk(2), file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("content"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	uuid := diskUUID(t, i.disk(2))
	away := i.disk(2) + ".away"
	if err := os.Rename(i.disk(2), away); err != nil {
		t.Fatal(err)
	}
	until(t, i, 60*time.Second, "backingimage", "forgotten", "does not know of the disk that is away", func(o imageObject) bool {
		return o.Status.DiskFileStatusMap[uuid].State == "unknown"
	})
	i.cli(t, "delete", "backingimage", "forgotten")
	untilGone(t, i, 20*time.Second, "backingimage", "forgotten")
	manager := "bim-" + uuid
	mustPut(t, i, "backingimagemanager", manager, func(o map[string]any) { spec(o)["backingImages"] = map[string]any{} })
	untilGone(t, i, 20*time.Second, "backingimagemanager", manager)
	if len(filesOf(away, "forgotten")) == 0 {
		t.Fatal("nothing was left on the disk, so that nothing is tested")
	}

	// Its agent may have begun anew at the empty place.
	os.RemoveAll(i.disk(2))
	if err := os.Rename(away, i.disk(2)); err != nil {
		t.Fatal(err)
	}
	eventually(t, 90*time.Second, "orphans and what is foreign are told", func() (bool, string) {
		why := i.why("backingimagemanager", manager)
		told := true
		for _, path := range []string{partial, "backing-images/forgotten-" + made.Status.UUID, "backing-images/my-own-thing"} {
			told = told && strings.Contains(why, path)
		}
		return told && strings.Contains(why, "it is removed at"), why
	})
	if len(filesOf(i.disk(2), "forgotten")) == 0 {
		t.Error("what was told was removed at once")
	}
	eventually(t, 20*time.Second, "events tell of both", func() (bool, string) {
		events := i.cli(t, "get", "events", "-A")
		return strings.Contains(events, "OrphansFound") && strings.Contains(events, "ForeignFiles"), events
	})
	eventually(t, 150*time.Second, "the files are removed, and no manager is left", func() (bool, string) {
		left := filesOf(i.disk(2), "forgotten")
		managers, err := tryList[object](i, "backingimagemanager")
		return len(left) == 0 && err == nil && len(managers) == 0, fmt.Sprint(left, managers, err)
	})
	if content, err := os.ReadFile(filepath.Join(i.disk(2), foreign)); string(content) != "content" {
		t.Errorf("a foreign file: %q %v", content, err)
	}
}
