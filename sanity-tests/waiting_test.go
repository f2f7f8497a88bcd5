package sanitytests

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What cannot be placed waits with a reason, in the status and in `why`, and says what can be done.
func TestNothingWaitsWithoutAReason(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)

	t.Run("an image for which no disk is eligible", func(t *testing.T) {
		yaml := imageYAML("homeless", url, image.checksum, 1) + "  nodeSelector: [no-such-tag]\n"
		i.apply(t, yaml)
		removeImage(t, i, "homeless")
		object := until(t, i, 20*time.Second, "backingimage", "homeless", "has no eligible disk", func(o imageObject) bool {
			return conditionOf(o.Status.Conditions, "Ready").Reason == "NoEligibleDisk"
		})
		ready := conditionOf(object.Status.Conditions, "Ready")
		mentions(t, "the condition", ready.Message, "node-1", "no-such-tag")
		mentions(t, "why", i.why("backingimage", "homeless"), "homeless", "no-such-tag", "You can:")
		noTemporaryFiles(t, i, "homeless")
	})
	t.Run("more replicas than disks", func(t *testing.T) {
		removeImage(t, i, "crowded")
		volume := createVolume(t, i, createRequest("crowded", 32*mib, imageParameters("crowded", url, image.checksum, 5)))
		object := until(t, i, 20*time.Second, "volume", volume.VolumeId, "has too few places", func(v volumeObject) bool {
			return conditionOf(v.Status.Conditions, "Scheduled").Reason == "NotAllPlaced"
		})
		mentions(t, "the condition", conditionOf(object.Status.Conditions, "Scheduled").Message, "3 of 5")
		mentions(t, "why", i.why("volume", volume.VolumeId), volume.VolumeId, "3 of 5", "You can:")
	})
	t.Run("a volume for which no disk is eligible", func(t *testing.T) {
		removeImage(t, i, "placeless")
		parameters := imageParameters("placeless", url, image.checksum, 1)
		parameters["diskSelector"] = "no-such-tag"
		volume := createVolume(t, i, createRequest("placeless", 32*mib, parameters))
		until(t, i, 20*time.Second, "volume", volume.VolumeId, "has no place", func(v volumeObject) bool {
			ready := conditionOf(v.Status.Conditions, "Ready")
			return ready.Reason == "NoEligibleDisk" && says(ready.Message, []string{"no-such-tag"})
		})
		mentions(t, "why", i.why("volume", volume.VolumeId), volume.VolumeId, "no-such-tag", "You can:")
	})
}

// gatedServer serves a file, but only once open is called.
func gatedServer(t *testing.T, path string) (url string, open func()) {
	t.Helper()
	gate := make(chan struct{})
	open = sync.OnceFunc(func() { close(gate) })
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-gate:
			http.ServeFile(w, r, path)
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(server.Close)
	t.Cleanup(open)
	return server.URL + "/" + filepath.Base(path), open
}

// The image turns out to be larger than its volume after that was made: it is never attached, and says so at once.
func TestVolumeSmallerThanAnImageOfUnknownSize(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 32)
	url, open := gatedServer(t, image.path)
	removeImage(t, i, "surprise")
	volume := createVolume(t, i, createRequest("surprise", 16*mib, imageParameters("surprise", url, image.checksum, 1)))
	if object := get[imageObject](t, i, "backingimage", "surprise"); object.Status.VirtualSize != 0 {
		t.Fatalf("the size is known before a byte was served: %+v", object.Status)
	}
	open()
	untilImageReady(t, i, "surprise")
	object := until(t, i, 20*time.Second, "volume", volume.VolumeId, "does not fit its image", func(v volumeObject) bool {
		return conditionOf(v.Status.Conditions, "BackingImageIncompatible").Status == "True"
	})
	condition := conditionOf(object.Status.Conditions, "BackingImageIncompatible")
	if condition.Reason != "BackingImageVirtualSizeTooLarge" {
		t.Errorf("reason %s", condition.Reason)
	}
	mentions(t, "the condition", condition.Message, "surprise", "33554432", "16777216")
	mentions(t, "why", i.why("volume", volume.VolumeId), volume.VolumeId, "33554432", "16777216", "You can:")

	request := publishRequest(t, i, volume, 1, mountCapability())
	_, err := i.controller(t).ControllerPublishVolume(call(t), request)
	if status.Code(err) != codes.OutOfRange {
		t.Errorf("want OutOfRange: %v", err)
	}
	mentions(t, "the error", status.Convert(err).Message(), volume.VolumeId, "33554432", "16777216")
	if got := get[volumeObject](t, i, "volume", volume.VolumeId).Status.State; strings.HasPrefix(got, "attach") {
		t.Errorf("the volume is %s", got)
	}
	noTemporaryFiles(t, i, "surprise")
}

// A user who gives up a pending attachment need not wait until its call has run out of time. An attachment that was ended by
// that says so; one that has run out of time says what it waited for.
func TestADetachmentEndsAPendingAttachment(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	url, _ := gatedServer(t, image.path)
	t.Cleanup(func() { removeClaim(t, i, "gated") })
	i.apply(t, classYAML("gated", "gated", url, image.checksum, 1)+"---\n"+claimYAML("gated", "gated", 32, "Filesystem"))
	ended := make(chan string, 1)
	go func() {
		_, stderr, _ := i.run("", "volume", "attach", "gated", "--node", "node-1")
		ended <- stderr
	}()
	volume := volumeOf(t, i, "gated")
	until(t, i, 20*time.Second, "volume", volume, "is wished attached", func(v volumeObject) bool {
		return v.Spec.NodeID == "node-1"
	})
	i.cli(t, "volume", "detach", "gated")
	mentions(t, "the pending attachment", <-ended, "gated")
	log, err := os.ReadFile(i.logPath())
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, volume) && strings.Contains(line, "was told to leave node") {
			return
		}
	}
	t.Error("the call that attached ran out of time before the volume was detached")
}
