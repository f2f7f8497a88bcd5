package sanitytests

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// What is slow long after it would have been over without a limit is held by it: the files of these tests have 3 MiB of data at least, at 64 KiB/s.
const surelySlow = 3 * time.Second

// isSlow makes sure that something goes on for a while without an end.
func isSlow(t *testing.T, what string, isOver func() (bool, string)) {
	t.Helper()
	begun := time.Now()
	eventually(t, time.Minute, what+" goes on for a while", func() (bool, string) {
		over, state := isOver()
		if over {
			t.Fatalf("%s was over after %v: %s", what, time.Since(begun), state)
		}
		return time.Since(begun) > surelySlow, state
	})
}

// untilLimited waits until the manager of a disk says that so much is sent at most.
func untilLimited(t *testing.T, i *instance, disk, holds string) {
	t.Helper()
	service := compileProto(t, "../proto/bimrpc", "bimrpc.proto").Services().ByName("BackingImageManagerService")
	conn, err := grpc.NewClient(managerOf(t, i, disk).Status.IP+":8000", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, 20*time.Second, "the manager keeps to "+holds, func() (bool, string) {
		told := fmt.Sprint(invoke(t, conn, service, "List", "").Get(field(service, "List", "bandwidth")).Message())
		return strings.Contains(strings.ReplaceAll(told, " ", ""), holds), told
	})
}

// Slow while limits say so, whatever sets them; at once when they are lifted.
func TestABandwidthLimitSlowsATransferAndIsLiftedLive(t *testing.T) {
	const setting = "backing-image-bandwidth-limit"
	i := ownInstance(t, 2)
	image := ext4Image(t, 16)
	limitImage := func(bytes int) {
		t.Helper()
		mustPut(t, i, "backingimage", "slow", func(o map[string]any) { spec(o)["bandwidthLimit"] = bytes })
	}

	// The download.
	setSetting(t, i, setting, "64Ki")
	i.apply(t, imageYAML("slow", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 1))
	removeImage(t, i, "slow")
	type source struct {
		Status struct {
			CurrentState string `json:"currentState"`
			Progress     int    `json:"progress"`
			Message      string `json:"message"`
		} `json:"status"`
	}
	until(t, i, 30*time.Second, "backingimagedatasource", "slow", "downloads", func(s source) bool { return s.Status.CurrentState == "in-progress" })
	mentions(t, "why", i.why("image", "slow"), "it downloads at most 65536 bytes/s by setting "+setting)
	isSlow(t, "the download", func() (bool, string) {
		s := get[source](t, i, "backingimagedatasource", "slow").Status
		if s.Message != "" {
			t.Errorf("it complains: %s", s.Message)
		}
		return s.CurrentState != "in-progress" || s.Progress >= 50, fmt.Sprint(s)
	})
	setSetting(t, i, setting, "0")
	ready := untilCopies(t, i, "slow", 1)

	// A further copy, under both limits, of which each one is enough.
	limitImage(70000)
	for disk := range ready.Status.DiskFileStatusMap {
		untilLimited(t, i, disk, "70000")
	}
	i.cli(t, "image", "set-copies", "slow", "2")
	isCopied := func() (bool, string) {
		o := get[imageObject](t, i, "backingimage", "slow")
		for _, file := range o.Status.DiskFileStatusMap {
			if file.Message != "" {
				t.Errorf("a copy complains: %s", file.Message)
			}
		}
		return len(readyCopies(o)) == 2, fmt.Sprint(o.Status.DiskFileStatusMap)
	}
	until(t, i, 20*time.Second, "backingimage", "slow", "is being copied", func(o imageObject) bool {
		for _, file := range o.Status.DiskFileStatusMap {
			if file.State == "in-progress" && file.Progress < 100 {
				return true
			}
		}
		return false
	})
	mentions(t, "why", i.why("image", "slow"), "each disk sends at most 70000 bytes/s by the image's spec.bandwidthLimit")
	isSlow(t, "the copy under the image's limit", isCopied)
	setSetting(t, i, setting, "100000")
	for disk := range ready.Status.DiskFileStatusMap {
		untilLimited(t, i, disk, "100000")
	}
	limitImage(0)
	mentions(t, "why", i.why("image", "slow"), "each disk sends at most 100000 bytes/s by setting "+setting)
	isSlow(t, "the copy under the limit of all", isCopied)
	setSetting(t, i, setting, "0")
	for _, path := range copyPaths(i, "slow", untilCopies(t, i, "slow", 2).Status.UUID) {
		if got := checksumOf(t, path); got != image.checksum {
			t.Errorf("%s has SHA-512 %s, want %s", path, got, image.checksum)
		}
	}

	// What would make a transfer look dead is refused with the range.
	for _, bad := range []string{"1", "63Ki", "-1", "fast"} {
		code, answer := put(t, i, "setting", setting, func(o map[string]any) { o["value"] = bad })
		if code == http.StatusOK {
			t.Errorf("setting %q was taken", bad)
		}
		mentions(t, "the refusal of "+bad, answer, "at least 64Ki", "would look dead", "the default is 0")
	}
	code, answer := put(t, i, "backingimage", "slow", func(o map[string]any) { spec(o)["bandwidthLimit"] = 1000 })
	if code == http.StatusOK {
		t.Error("an image's limit of 1000 was taken")
	}
	mentions(t, "the refusal", answer, "spec.bandwidthLimit", "at least 65536")
}
