package sanitytests

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// withinTheHour finds the copies that go when the default of the interval is over.
var withinTheHour = regexp.MustCompile(`(\S+) goes by itself in (?:60|59)m`)

func goingWithinTheHour(told string) (disks []string) {
	for _, match := range withinTheHour.FindAllStringSubmatch(told, -1) {
		disks = append(disks, match[1])
	}
	return disks
}

// untilCopies waits until an image has exactly so many copies, all of them ready.
func untilCopies(t testing.TB, i *instance, image string, copies int) imageObject {
	t.Helper()
	return until(t, i, 30*time.Second, "backingimage", image, fmt.Sprintf("has %d copies", copies), func(o imageObject) bool {
		return len(readyCopies(o)) == copies && len(o.Status.DiskFileStatusMap) == copies && len(o.Spec.DiskFileSpecMap) == copies
	})
}

// disksOf are the disks that hold a file of an image, as NODE/DISK.
func disksOf(t testing.TB, i *instance, image string) (labels []string) {
	t.Helper()
	paths, _ := filepath.Glob(i.path("nodes", "*", "*", "backing-images", image+"-*"))
	for _, path := range paths {
		parts := strings.Split(strings.TrimPrefix(path, i.path("nodes")+"/"), "/")
		labels = append(labels, parts[0]+"/"+parts[1])
	}
	return labels
}

// The number of copies is changed by a command, up and down, and takes effect at once; what is not said comes from the setting.
func TestImageSetCopiesShrinksAndGrowsWithoutARestart(t *testing.T) {
	i := ownInstance(t, 3)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	daemon := i.daemon.Process.Pid
	create := func(name string, copies int) {
		t.Helper()
		i.cli(t, "image", "create", name, "--url", url, "--checksum", image.checksum, "--wait")
		removeImage(t, i, name)
		if o := untilCopies(t, i, name, copies); o.Spec.MinNumberOfCopies != copies {
			t.Errorf("image %s says nothing and asks for %d copies, want %d as the setting says", name, o.Spec.MinNumberOfCopies, copies)
		}
	}
	setSetting(t, i, "default-min-number-of-backing-image-copies", "2")
	create("resized", 2)

	mentions(t, "set-copies", i.cli(t, "image", "set-copies", "resized", "3", "--wait"), "shall have 3 copies", "1 more will be made", "has its copies")
	untilCopies(t, i, "resized", 3)

	// Nothing goes before its time, and it says when that is.
	told := i.cli(t, "image", "set-copies", "resized", "1", "--wait")
	mentions(t, "set-copies", told, "shall have 1 copy", "no replica uses it", "frees")
	if len(goingWithinTheHour(told)) != 2 {
		t.Errorf("want two that go: %s", told)
	}
	untilCopies(t, i, "resized", 3)
	setSetting(t, i, "backing-image-cleanup-wait-interval", "0")
	untilCopies(t, i, "resized", 1)
	eventually(t, 10*time.Second, "the files are gone, too", func() (bool, string) {
		left := disksOf(t, i, "resized")
		return len(left) == 1, fmt.Sprint(left)
	})
	i.cli(t, "image", "set-copies", "resized", "2", "--wait")
	untilCopies(t, i, "resized", 2)
	i.cli(t, "image", "set-copies", "resized", "1", "--wait")
	if o := get[imageObject](t, i, "backingimage", "resized"); len(readyCopies(o)) != 1 || len(o.Status.DiskFileStatusMap) != 1 {
		t.Errorf("it did not wait until the other copy was given up: %+v", o.Status.DiskFileStatusMap)
	}

	// Another default is for images that are made from now on.
	setSetting(t, i, "default-min-number-of-backing-image-copies", "3")
	create("by-default", 3)
	untilCopies(t, i, "resized", 1)

	for _, c := range []struct {
		args     []string
		code     int
		mentions []string
	}{
		{[]string{"resized", "0"}, 2, []string{"must larger than 0"}},
		{[]string{"absent", "2"}, 3, []string{"absent"}},
		{[]string{"resized", "5", "--wait", "--timeout", "3s"}, 7, []string{"2 more wanted", "no further disk is eligible", "It goes on"}},
	} {
		stdout, stderr, code := i.run("", append([]string{"image", "set-copies"}, c.args...)...)
		if code != c.code {
			t.Errorf("set-copies %v: exit code %d, want %d: %s%s", c.args, code, c.code, stdout, stderr)
		}
		mentions(t, fmt.Sprint(c.args), stderr, c.mentions...)
	}
	untilCopies(t, i, "resized", 3)
	if i.daemon.Process.Pid != daemon || i.daemon.ProcessState != nil {
		t.Error("it was another daemon in the end")
	}
}

// Copies and replicas lie only where the tags of image and volume allow; what is missing says so instead of going elsewhere.
func TestCopiesAndReplicasLieOnlyWhereTheTagsAllow(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	i.apply(t, imageYAML("tagged", url, image.checksum, 2)+"  nodeSelector: [node-1]\n")
	removeImage(t, i, "tagged")
	object := until(t, i, 30*time.Second, "backingimage", "tagged", "lacks a copy", func(o imageObject) bool {
		return conditionOf(o.Status.Conditions, "Ready").Reason == "FewerCopies"
	})
	mentions(t, "the condition", conditionOf(object.Status.Conditions, "Ready").Message, "1 more wanted", "node-2", "lacks the tag `node-1`")
	if len(readyCopies(object)) != 1 || len(object.Spec.DiskFileSpecMap) != 1 {
		t.Errorf("want one copy: %+v", object.Status.DiskFileStatusMap)
	}
	if got := disksOf(t, i, "tagged"); !slices.Equal(got, []string{"node-1/disk-1"}) {
		t.Errorf("files lie on %v", got)
	}
	// Where the volume may be, the image may not.
	volume := createVolume(t, i, createRequest("tagged-elsewhere", 32*mib, map[string]string{
		"backingImage": "tagged", "numberOfReplicas": "1", "nodeSelector": "node-2",
	}))
	refused := until(t, i, 20*time.Second, "volume", volume.VolumeId, "has no place", func(v volumeObject) bool {
		return conditionOf(v.Status.Conditions, "Scheduled").Status == "False"
	})
	mentions(t, "the condition", conditionOf(refused.Status.Conditions, "Scheduled").Message, "node-1", "node-2")
	mentions(t, "why", i.why("volume", volume.VolumeId), "lacks the tag", "You can:")
	if replicas := replicasOf(t, i, volume.VolumeId); len(replicas) != 0 && replicas[0].Spec.DiskPath != "" {
		t.Errorf("a replica was placed: %+v", replicas)
	}
	// The tag comes to another node: the copy that is missing, too.
	mustPut(t, i, "node", "node-3", func(o map[string]any) { spec(o)["tags"] = append(spec(o)["tags"].([]any), "node-1") })
	t.Cleanup(func() {
		mustPut(t, i, "node", "node-3", func(o map[string]any) {
			spec(o)["tags"] = slices.DeleteFunc(spec(o)["tags"].([]any), func(tag any) bool { return tag == "node-1" })
		})
	})
	untilCopies(t, i, "tagged", 2)
	if got := disksOf(t, i, "tagged"); !slices.Equal(got, []string{"node-1/disk-1", "node-3/disk-1"}) {
		t.Errorf("files lie on %v", got)
	}
}

// All volumes of an image share one file on a disk. What no replica uses stays until the interval is over, then file and entry go;
// what another volume uses is not touched, and one copy stays when nobody uses any.
func TestUnusedCopiesGoAfterTheIntervalAndUsedOnesAreNotTouched(t *testing.T) {
	i := ownInstance(t, 3)
	image := ext4Image(t, 16)
	removeImage(t, i, "shared")
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	i.apply(t, imageYAML("shared", url, image.checksum, 1))
	untilImageReady(t, i, "shared")
	// The replicas of the first volume are on all nodes, those of the others on one each.
	volumes := map[string]string{}
	for claim, tag := range map[string]string{"shared-wide": "", "shared-one": "node-1", "shared-two": "node-2"} {
		t.Cleanup(func() { removeClaim(t, i, claim) })
		class := classYAML(claim, "shared", url, image.checksum, 3)
		if tag != "" {
			class = classYAML(claim, "shared", url, image.checksum, 1) + "  nodeSelector: " + tag + "\n"
		}
		i.apply(t, class+"---\n"+claimYAML(claim, claim, 32, "Filesystem"))
		volumes[claim] = volumeOf(t, i, claim)
		i.cli(t, "volume", "mount", claim, "--node", "node-3", i.mountPoint(t))
		i.cli(t, "volume", "detach", claim)
	}
	object := untilCopies(t, i, "shared", 3)
	if files, _ := filepath.Glob(i.path("nodes", "*", "disk-1", "backing-images", "*", "backing")); len(files) != 3 {
		t.Fatalf("want one file on each of three disks: %v", files)
	}
	// The copy on a node, which nobody may touch while a replica lies over it.
	copyOn := func(node int) os.FileInfo {
		t.Helper()
		info, err := os.Stat(filepath.Join(i.disk(node), "backing-images", "shared-"+object.Status.UUID, "backing"))
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	first, second := copyOn(1), copyOn(2)
	untouched := func(before, now os.FileInfo) {
		t.Helper()
		if !os.SameFile(before, now) || before.ModTime() != now.ModTime() {
			t.Errorf("the copy below a replica is not what it was: %v, then %v", before, now)
		}
	}
	remove := func(claim string) {
		t.Helper()
		i.cli(t, "delete", "pvc", claim)
		untilGone(t, i, 30*time.Second, "volume", volumes[claim])
	}

	remove("shared-wide")
	told := i.cli(t, "image", "clean-up", "shared", "--dry-run")
	if going := goingWithinTheHour(told); !slices.Equal(going, []string{"node-3/disk-1"}) {
		t.Errorf("want the one on node-3 to go within the hour: %s", told)
	}
	untilCopies(t, i, "shared", 3)
	setSetting(t, i, "backing-image-cleanup-wait-interval", "0")
	untilNoFiles(t, i, "node-3/disk-1", "shared")
	untilCopies(t, i, "shared", 2)
	untouched(first, copyOn(1))
	untouched(second, copyOn(2))

	remove("shared-one")
	untilNoFiles(t, i, "node-1/disk-1", "shared")
	untilCopies(t, i, "shared", 1)
	untouched(second, copyOn(2))

	remove("shared-two")
	untilCopies(t, i, "shared", 1)
	untouched(second, copyOn(2))
	for _, path := range copyPaths(i, "shared", object.Status.UUID) {
		if got := checksumOf(t, path); got != image.checksum {
			t.Errorf("%s: SHA-512 %s", path, got)
		}
	}
}
