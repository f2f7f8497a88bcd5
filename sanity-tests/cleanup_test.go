package sanitytests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// put reads an object, changes it and puts it back as it is; the status code is an outcome.
func put(t testing.TB, i *instance, kind, name string, change func(object map[string]any)) (code int, answer string) {
	t.Helper()
	for {
		o := get[map[string]any](t, i, kind, name)
		change(o)
		content, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		request, err := http.NewRequest(http.MethodPut, i.collection(kind)+"/"+name, bytes.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Content-Type", "application/json")
		response, err := (&http.Client{Timeout: commandWithin}).Do(request)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(response.Body)
		response.Body.Close()
		// Somebody else was faster.
		if response.StatusCode != http.StatusConflict {
			return response.StatusCode, string(body)
		}
	}
}

// mustPut is a put that succeeds.
func mustPut(t testing.TB, i *instance, kind, name string, change func(object map[string]any)) {
	t.Helper()
	if code, answer := put(t, i, kind, name, change); code != http.StatusOK {
		t.Fatalf("PUT %s %s: %d %s", kind, name, code, answer)
	}
}

func spec(object map[string]any) map[string]any { return object["spec"].(map[string]any) }

func copiesIn(object map[string]any) map[string]any {
	return spec(object)["diskFileSpecMap"].(map[string]any)
}

func setSetting(t testing.TB, i *instance, name, value string) {
	t.Helper()
	mustPut(t, i, "setting", name, func(o map[string]any) { o["value"] = value })
}

// threeCopies makes a claim with one replica on an image with three copies; returns the disk in use and the others, as NODE/DISK.
func threeCopies(t *testing.T, i *instance, name string, image imageFile) (volume, used string, others []string) {
	t.Helper()
	volume = newClaim(t, i, name, image, 32, 1, "Filesystem")
	mustPut(t, i, "backingimage", name, func(o map[string]any) { spec(o)["minNumberOfCopies"] = 3 })
	until(t, i, 30*time.Second, "backingimage", name, "has three copies", func(o imageObject) bool { return len(readyCopies(o)) == 3 })
	var path string
	eventually(t, 10*time.Second, "the replica has a place", func() (bool, string) {
		replicas := replicasOf(t, i, volume)
		if len(replicas) != 1 || replicas[0].Spec.DiskPath == "" {
			return false, fmt.Sprintf("%+v", replicas)
		}
		path = replicas[0].Spec.DiskPath
		return true, ""
	})
	for node := 1; node <= i.nodes; node++ {
		label := fmt.Sprintf("node-%d/disk-1", node)
		if i.disk(node) == path {
			used = label
		} else {
			others = append(others, label)
		}
	}
	return volume, used, others
}

// filesAt lists what lies of an image on a disk that is called NODE/DISK.
func filesAt(i *instance, label, image string) []string {
	return filesOf(i.path("nodes", filepath.Dir(label), filepath.Base(label)), image)
}

func untilNoFiles(t *testing.T, i *instance, label, image string) {
	t.Helper()
	eventually(t, 20*time.Second, "no file of "+image+" is on "+label, func() (bool, string) {
		left := filesAt(i, label, image)
		return len(left) == 0, fmt.Sprint(left)
	})
}

// Copies go by a command, by an edit and by themselves only where nothing needs them; whoever asks hears which guard keeps one.
func TestImageCleanUpTakesOnlyWhatNothingKeeps(t *testing.T) {
	i := ownInstance(t, 3)
	volume, used, others := threeCopies(t, i, "shrinks", ext4Image(t, 16))
	refused := func(what string, args ...string) {
		t.Helper()
		stdout, stderr, code := i.run("", append([]string{"image", "clean-up", "shrinks"}, args...)...)
		if code != 5 {
			t.Fatalf("image clean-up %v: exit code %d: %s%s", args, code, stdout, stderr)
		}
		mentions(t, "the refusal", stderr, "is kept", what)
	}
	refused("fewer than minNumberOfCopies asks for (3)", "--disk", others[0])
	refused("fewer than minNumberOfCopies asks for (3)", "--disk", others[0], "--dry-run")
	mentions(t, "the dry run", i.cli(t, "image", "clean-up", "shrinks", "--dry-run"), "nothing goes by itself")

	mustPut(t, i, "backingimage", "shrinks", func(o map[string]any) { spec(o)["minNumberOfCopies"] = 1 })
	refused("of volume "+volume+" uses it", "--disk", used, "--dry-run")
	refused("of volume "+volume+" uses it", "--disk", used)
	mentions(t, "the dry run", i.cli(t, "image", "clean-up", "shrinks", "--disk", others[0], "--dry-run"), others[0]+" would go and free ", " MiB")
	mentions(t, "the dry run", i.cli(t, "image", "clean-up", "shrinks", "--dry-run"), others[0]+" goes by itself in ", others[1], "no replica uses it")
	if got := len(readyCopies(get[imageObject](t, i, "backingimage", "shrinks"))); got != 3 {
		t.Fatalf("a dry run took copies: %d are left", got)
	}
	mentions(t, "the clean-up", i.cli(t, "image", "clean-up", "shrinks", "--disk", others[0]), others[0]+" removed, ", " freed")
	untilNoFiles(t, i, others[0], "shrinks")

	// The map of wanted copies is guarded as well, whoever writes it.
	code, answer := put(t, i, "backingimage", "shrinks", func(o map[string]any) { spec(o)["diskFileSpecMap"] = map[string]any{} })
	if code != http.StatusForbidden || !strings.Contains(answer, "uses it") || !strings.Contains(answer, volume) {
		t.Errorf("an emptied map: %d %s", code, answer)
	}
	before := get[imageObject](t, i, "backingimage", "shrinks").Spec.DiskFileSpecMap
	mustPut(t, i, "backingimage", "shrinks", func(o map[string]any) { delete(spec(o), "diskFileSpecMap") })
	if after := get[imageObject](t, i, "backingimage", "shrinks"); len(after.Spec.DiskFileSpecMap) != len(before) || len(readyCopies(after)) != 2 {
		t.Errorf("an object without the map changed it: %+v", after)
	}

	// By itself, once the interval is over; the one under the replica stays, and is still the image.
	setSetting(t, i, "backing-image-cleanup-wait-interval", "0")
	untilNoFiles(t, i, others[1], "shrinks")
	image := until(t, i, 10*time.Second, "backingimage", "shrinks", "has one copy", func(o imageObject) bool { return len(o.Status.DiskFileStatusMap) == 1 })
	if len(readyCopies(image)) != 1 || len(filesAt(i, used, "shrinks")) == 0 {
		t.Errorf("the copy in use: %+v", image.Status)
	}

	// Raising the minimum makes copies again, live.
	mustPut(t, i, "backingimage", "shrinks", func(o map[string]any) { spec(o)["minNumberOfCopies"] = 2 })
	until(t, i, 20*time.Second, "backingimage", "shrinks", "has two copies", func(o imageObject) bool { return len(readyCopies(o)) == 2 })
}

// An entry of a disk that no node has says so, disturbs nothing, and goes by itself or by an edit.
func TestEntryOfAnUnknownDiskSaysSoAndGoes(t *testing.T) {
	i := ownInstance(t, 2)
	const bogus = "00000000-0000-4000-8000-00000000beef"
	image := ext4Image(t, 16)
	removeImage(t, i, "bogus")
	i.apply(t, imageYAML("bogus", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 2))
	isKnown := func(o imageObject) bool {
		return strings.Contains(o.Status.DiskFileStatusMap[bogus].Message, "no node has a disk "+bogus)
	}
	add := func() {
		t.Helper()
		mustPut(t, i, "backingimage", "bogus", func(o map[string]any) { copiesIn(o)[bogus] = map[string]any{} })
		o := until(t, i, 10*time.Second, "backingimage", "bogus", "says that nobody has the disk", isKnown)
		if len(readyCopies(o)) != 2 {
			t.Errorf("the other copies: %+v", o.Status)
		}
		mentions(t, "why", i.why("image", "bogus"), "no node has a disk "+bogus)
	}
	isGone := func(o imageObject) bool {
		_, wanted := o.Spec.DiskFileSpecMap[bogus]
		_, seen := o.Status.DiskFileStatusMap[bogus]
		return !wanted && !seen && len(readyCopies(o)) == 2
	}
	until(t, i, 30*time.Second, "backingimage", "bogus", "has two copies", func(o imageObject) bool { return len(readyCopies(o)) == 2 })
	add()
	mustPut(t, i, "backingimage", "bogus", func(o map[string]any) { delete(copiesIn(o), bogus) })
	until(t, i, 10*time.Second, "backingimage", "bogus", "is without the disk", isGone)
	add()
	setSetting(t, i, "backing-image-recovery-wait-interval", "0")
	until(t, i, 10*time.Second, "backingimage", "bogus", "is without the disk", isGone)
}

// Images and volumes of the same names, one after the other: each round leaves no file, no object and no manager.
func TestSameNamesLeaveNothingThreeTimes(t *testing.T) {
	i := ownInstance(t, 2)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	names := []string{"again-a", "again-b"}
	uuids := map[string]bool{}
	for round := range 3 {
		volumes := map[string]string{}
		for _, name := range names {
			t.Cleanup(func() { removeClaim(t, i, name) })
			i.apply(t, classYAML(name, name, url, image.checksum, 2)+"---\n"+claimYAML(name, name, 32, "Filesystem"))
			volumes[name] = volumeOf(t, i, name)
		}
		for _, name := range names {
			uuid := untilImageReady(t, i, name).Status.UUID
			if uuids[uuid] {
				t.Errorf("round %d: image %s has a uuid of before: %s", round, name, uuid)
			}
			uuids[uuid] = true
			i.cli(t, "volume", "mount", name, "--node", "node-1", i.mountPoint(t))
			i.cli(t, "volume", "detach", name)
		}
		for _, name := range names {
			i.cli(t, "delete", "pvc", name)
			i.cli(t, "delete", "storageclass", name)
			untilGone(t, i, 30*time.Second, "volume", volumes[name])
			i.cli(t, "delete", "backingimage", name)
			untilGone(t, i, 20*time.Second, "backingimage", name)
			nothingLeftOf(t, i, name, volumes[name])
		}
		eventually(t, 20*time.Second, "no manager is left", func() (bool, string) {
			managers, err := tryList[object](i, "backingimagemanager")
			isManager := func(p process) bool { return strings.Contains(p.String(), "backing-image-manager daemon") }
			running := slices.ContainsFunc(processesOf(i.dir), isManager)
			return err == nil && len(managers) == 0 && !running, fmt.Sprintf("%v %v, a process: %v", managers, err, running)
		})
	}
}

// What lies on a disk that is away when its image is deleted holds nothing up, and is removed when the disk is back.
func TestDeletionDoesNotWaitForADiskThatIsAway(t *testing.T) {
	i := ownInstance(t, 3)
	image := ext4Image(t, 16)
	removeImage(t, i, "left")
	i.apply(t, imageYAML("left", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 3))
	until(t, i, 30*time.Second, "backingimage", "left", "has three copies", func(o imageObject) bool { return len(readyCopies(o)) == 3 })
	uuid := diskUUID(t, i.disk(2))
	away := i.disk(2) + ".away"
	if err := os.Rename(i.disk(2), away); err != nil {
		t.Fatal(err)
	}
	back := func() error {
		// Its agent may have begun anew at the empty place.
		os.RemoveAll(i.disk(2))
		return os.Rename(away, i.disk(2))
	}
	until(t, i, 60*time.Second, "backingimage", "left", "does not know of the disk that is away", func(o imageObject) bool {
		return o.Status.DiskFileStatusMap[uuid].State == "unknown"
	})
	i.cli(t, "delete", "backingimage", "left")
	untilGone(t, i, 20*time.Second, "backingimage", "left")
	for _, node := range []int{1, 3} {
		if found := filesOf(i.disk(node), "left"); len(found) != 0 {
			t.Errorf("files of a deleted image: %v", found)
		}
	}
	if len(filesOf(away, "left")) == 0 {
		t.Fatal("nothing was left on the disk, so that nothing is tested")
	}
	// Its manager remembers, and so does an instance that is started anew.
	eventually(t, 20*time.Second, "one manager is left, that of this disk", func() (bool, string) {
		managers, err := tryList[object](i, "backingimagemanager")
		isIt := err == nil && len(managers) == 1 && managers[0].Metadata.Labels["longhorn.io/disk-uuid"] == uuid
		return isIt, fmt.Sprint(managers, err)
	})
	if err := back(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 60*time.Second, "the files are removed", func() (bool, string) {
		left := filesOf(i.disk(2), "left")
		managers, err := tryList[object](i, "backingimagemanager")
		return len(left) == 0 && err == nil && len(managers) == 0, fmt.Sprint(left, managers, err)
	})
	if got := diskUUID(t, i.disk(2)); got != uuid {
		t.Errorf("the disk has another UUID: %s", got)
	}
}
