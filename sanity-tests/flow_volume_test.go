package sanitytests

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// The life of an image under a volume of three replicas: three ready copies that say what they are; the copy below a replica is not
// cleaned up, the image is not deleted; both go without the volume.
func TestAnImageIsHeldByItsVolumeAndGoesWithoutIt(t *testing.T) {
	i := ownInstance(t, 3)
	image := ext4Image(t, 32)
	volume := newClaim(t, i, "basic", image, 32, 3, "Filesystem")
	i.cli(t, "volume", "mount", "basic", "--node", "node-1", i.mountPoint(t))
	i.cli(t, "volume", "detach", "basic")
	object := untilCopies(t, i, "basic", 3)
	if object.Status.Checksum != image.checksum || object.Spec.SourceType != "download" || !strings.HasSuffix(object.Spec.SourceParameters["url"], "/image.raw") {
		t.Errorf("the image does not say what it is: %+v", object)
	}
	for _, label := range []string{"node-1/disk-1", "node-2/disk-1", "node-3/disk-1"} {
		_, stderr, code := i.run("", "image", "clean-up", "basic", "--disk", label)
		if code != 5 {
			t.Errorf("clean-up of %s: exit code %d", label, code)
		}
		mentions(t, "the refusal", stderr, "of volume "+volume+" uses it")
	}
	request, err := http.NewRequest(http.MethodDelete, i.collection("backingimage")+"/basic", nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	var refusal bytes.Buffer
	refusal.ReadFrom(response.Body)
	response.Body.Close()
	if response.StatusCode < 400 {
		t.Errorf("the deletion was accepted: %s", response.Status)
	}
	mentions(t, "the refusal", refusal.String(), "since there are replicas using it", volume)
	if after := untilCopies(t, i, "basic", 3); after.Metadata.DeletionTimestamp != "" {
		t.Error("a deletion that was refused has begun")
	}

	i.cli(t, "delete", "pvc", "basic")
	untilGone(t, i, 30*time.Second, "volume", volume)
	i.cli(t, "image", "clean-up", "basic", "--disk", "node-2/disk-1")
	if after := untilCopies(t, i, "basic", 2); after.Status.DiskFileStatusMap[diskUUID(t, i.disk(2))].State != "" {
		t.Errorf("the entry of node-2 is left: %+v", after.Status.DiskFileStatusMap)
	}
	untilNoFiles(t, i, "node-2/disk-1", "basic")
	i.cli(t, "delete", "backingimage", "basic")
	untilGone(t, i, 20*time.Second, "backingimage", "basic")
	nothingLeftOf(t, i, "basic", volume)
}

// Two volumes of one image: each is a filesystem without having been made one, and none sees what is written to the other.
func TestVolumesOfOneImageDoNotSeeEachOther(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	removeImage(t, i, "content")
	paths := map[string]publishedPaths{}
	withdraws := []func(){}
	for _, name := range []string{"content-a", "content-b"} {
		volume := createVolume(t, i, createRequest(name, 16*mib, imageParameters("content", url, image.checksum, 2)))
		published, withdraw := publishOnNode(t, i, volume, 1, mountCapability())
		paths[name], withdraws = published, append(withdraws, withdraw)
		image.verify(t, published.target)
	}
	names := func(dir string) (names []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			names = append(names, entry.Name())
		}
		return names
	}
	before := names(paths["content-b"].target)
	writeSynced(t, filepath.Join(paths["content-a"].target, "new.bin"), randomBytes(61, mib))
	writeSynced(t, filepath.Join(paths["content-a"].target, "hello.txt"), []byte("hello from the volume\n"))
	dropCaches(t)
	if now := names(paths["content-b"].target); !slices.Equal(before, now) || !slices.Contains(now, "hello.txt") {
		t.Errorf("one volume shows what was written to the other: %v, then %v", before, now)
	}
	image.verify(t, paths["content-b"].target)
	for _, withdraw := range withdraws {
		withdraw()
	}
	for _, path := range copyPaths(i, "content", get[imageObject](t, i, "backingimage", "content").Status.UUID) {
		if got := checksumOf(t, path); got != image.checksum {
			t.Errorf("%s was written to: SHA-512 %s", path, got)
		}
	}
}

// A volume that is attached while its image comes waits and says for what, and is the image when it is there.
func TestAVolumeWaitsForItsImageAndIsItsContentThen(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	url, half, release := heldServer(t, image.path)
	removeImage(t, i, "coming")
	request := createRequest("coming", 16*mib, imageParameters("coming", url, image.checksum, 3))
	request.VolumeCapabilities = []*csi.VolumeCapability{blockCapability()}
	volume := createVolume(t, i, request)
	published, controller := make(chan struct{}), i.controller(t)
	publishing, ctx := publishRequest(t, i, volume, 1, blockCapability()), call(t)
	go func() {
		// What it answers is asked for again below.
		controller.ControllerPublishVolume(ctx, publishing)
		close(published)
	}()
	select {
	case <-half:
	case <-time.After(readyWithin):
		t.Fatalf("the download did not begin: %s", i.why("backingimage", "coming"))
	}
	waits := func(status, state string) volumeObject {
		t.Helper()
		return until(t, i, 30*time.Second, "volume", volume.VolumeId, "is "+state+", WaitForBackingImage is "+status, func(v volumeObject) bool {
			return conditionOf(v.Status.Conditions, "WaitForBackingImage").Status == status && v.Status.State == state
		})
	}
	seen := waits("True", "attaching")
	mentions(t, "the condition", conditionOf(seen.Status.Conditions, "WaitForBackingImage").Message, "coming")
	release()
	<-published
	paths, withdraw := publishOnNode(t, i, volume, 1, blockCapability())
	waits("False", "attached")
	if object := get[imageObject](t, i, "backingimage", "coming"); len(readyCopies(object)) != 3 {
		t.Errorf("want three ready copies: %+v", object.Status.DiskFileStatusMap)
	}
	if got := checksumOf(t, paths.target); got != image.checksum {
		t.Errorf("the device is not the image: SHA-512 %s", got)
	}
	withdraw()
}

// All images of a disk are removed below a volume that is in use: the copy fails and comes back by itself, the volume is healthy.
func TestImagesThatAreRemovedUnderAVolumeComeBack(t *testing.T) {
	i := ownInstance(t, 3)
	image := ext4Image(t, 16)
	volume := newClaim(t, i, "resynced", image, 32, 3, "Filesystem")
	mount := i.mountPoint(t)
	i.cli(t, "volume", "mount", "resynced", "--node", "node-1", mount)
	untilRobust(t, i, volume, "healthy")
	object := untilCopies(t, i, "resynced", 3)
	uuid := diskUUID(t, i.disk(2))
	failed := make(chan struct{}, 1)
	eachVersion(t, i, "backingimage", "resynced", func(o imageObject) {
		if o.Status.DiskFileStatusMap[uuid].State == "failed" {
			select {
			case failed <- struct{}{}:
			default:
			}
		}
	})
	if err := os.RemoveAll(filepath.Join(i.disk(2), "backing-images")); err != nil {
		t.Fatal(err)
	}
	select {
	case <-failed:
	case <-time.After(20 * time.Second):
		t.Fatalf("the copy never failed: %s", i.why("backingimage", "resynced"))
	}
	untilCopies(t, i, "resynced", 3)
	path := filepath.Join(i.disk(2), "backing-images", "resynced-"+object.Status.UUID, "backing")
	if got := checksumOf(t, path); got != image.checksum {
		t.Errorf("SHA-512 %s", got)
	}
	untilRobust(t, i, volume, "healthy")
	dropCaches(t)
	image.verify(t, mount)
	i.cli(t, "volume", "unmount", "resynced", "--node", "node-1", mount)
	i.cli(t, "volume", "detach", "resynced")
}

// A volume that a user made as an object is served to whoever knows its name, as for a PersistentVolume that is written by hand.
func TestAVolumeIsServedByItsHandleAlone(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	i.apply(t, imageYAML("static", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 1))
	removeImage(t, i, "static")
	untilImageReady(t, i, "static")
	i.apply(t, fmt.Sprintf(`apiVersion: longhorn.io/v1beta2
kind: Volume
metadata:
  name: static
  namespace: longhorn-system
spec:
  size: "%d"
  numberOfReplicas: 2
  frontend: blockdev
  dataEngine: v1
  backingImage: static
`, 32*mib))
	volume := &csi.Volume{VolumeId: "static", VolumeContext: map[string]string{"backingImage": "static", "numberOfReplicas": "2"}}
	t.Cleanup(func() {
		if _, err := i.controller(t).DeleteVolume(call(t), &csi.DeleteVolumeRequest{VolumeId: "static"}); err != nil {
			t.Errorf("DeleteVolume: %v", err)
		}
	})
	written := randomBytes(62, mib)
	for _, node := range []int{1, 3} {
		paths, withdraw := publishOnNode(t, i, volume, node, mountCapability())
		image.verify(t, paths.target)
		file := filepath.Join(paths.target, "written.bin")
		if node == 1 {
			writeSynced(t, file, written)
		} else if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, written) {
			t.Errorf("what was written on node-1 is not there (%d bytes, %v)", len(got), err)
		}
		withdraw()
	}
}
