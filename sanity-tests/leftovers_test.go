package sanitytests

import (
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// After a claim, its volume and its image are deleted the instance is as it was before: objects, files, processes, mounts, loop devices.
func TestDeletionLeavesNothingBehind(t *testing.T) {
	i := ownInstance(t, 3)
	var before []string
	// An instance is ready to be asked before its disks are.
	eventually(t, 30*time.Second, "every disk has its description", func() (bool, string) {
		before = stateOf(t, i)
		described := func(s string) bool { return strings.HasSuffix(s, "/longhorn-disk.cfg") }
		writing := func(s string) bool { return strings.HasSuffix(s, ".writing") }
		others := len(slices.DeleteFunc(slices.Clone(before), described))
		return len(before)-others == 3 && !slices.ContainsFunc(before, writing), strings.Join(before, "\n")
	})
	image := ext4Image(t, 16).compressedQcow2(t)
	volume := newClaim(t, i, "passing", image, 32, 3, "Filesystem")
	mount := i.mountPoint(t)
	i.cli(t, "volume", "mount", "passing", "--node", "node-2", mount)
	writeSynced(t, filepath.Join(mount, "written.bin"), randomBytes(41, mib))
	if now := stateOf(t, i); len(now) <= len(before) || !slices.ContainsFunc(now, func(s string) bool { return strings.HasPrefix(s, "loop device ") }) {
		t.Fatalf("a mounted volume leaves no traces: %v", now)
	}
	i.cli(t, "volume", "unmount", "passing", "--node", "node-2", mount)
	i.cli(t, "volume", "detach", "passing")
	i.cli(t, "delete", "pvc", "passing")
	untilGone(t, i, 20*time.Second, "volume", volume)
	i.cli(t, "delete", "backingimage", "passing")
	i.cli(t, "delete", "storageclass", "passing")
	eventually(t, 30*time.Second, "everything is as before", func() (bool, string) {
		now := stateOf(t, i)
		more := slices.DeleteFunc(slices.Clone(now), func(s string) bool { return slices.Contains(before, s) })
		less := slices.DeleteFunc(slices.Clone(before), func(s string) bool { return slices.Contains(now, s) })
		return len(more)+len(less) == 0, "new: " + strings.Join(more, "\n     ") + "\ngone: " + strings.Join(less, "\n      ")
	})
}

// stateOf lists all that an instance has: objects but events, files, processes, mounts, loop devices.
func stateOf(t testing.TB, i *instance) (state []string) {
	t.Helper()
	kinds := []string{
		"backingimage", "backingimagemanager", "backingimagedatasource", "volume", "engine", "replica", "node",
		"storageclass", "pvc", "pv", "volumeattachment",
	}
	for _, kind := range kinds {
		for _, o := range list[object](t, i, kind) {
			state = append(state, kind+" "+o.Metadata.Name)
		}
	}
	filepath.WalkDir(i.dir, func(path string, entry fs.DirEntry, err error) error {
		// The directories of a disk's layout stay.
		if err == nil && !(entry.IsDir() && slices.Contains([]string{"backing-images", "replicas", "tmp", "staging"}, entry.Name())) &&
			filepath.Dir(path) != i.path("staging") {
			state = append(state, "file "+path)
		}
		return nil
	})
	return append(state, leftovers(i.root)...)
}
