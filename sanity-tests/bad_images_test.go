package sanitytests

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Sources that can never become a ready image: the reason stands in the status and in `why`, and no temporary file stays.
func TestBadImagesAreRefusedWithTheReason(t *testing.T) {
	i := sharedInstance(t)
	dir := t.TempDir()
	good := ext4Image(t, 16)
	qcow2 := good.compressedQcow2(t)

	odd := filepath.Join(dir, "odd.raw")
	if err := os.WriteFile(odd, randomBytes(3, 1*mib+100), 0o644); err != nil {
		t.Fatal(err)
	}
	withBacking := filepath.Join(dir, "with-backing.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/hostname", "-F", "raw", withBacking, "16M")
	withDataFile := filepath.Join(dir, "with-data-file.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "outside.raw")+",data_file_raw=on", withDataFile, "16M")
	content, err := os.ReadFile(qcow2.path)
	if err != nil {
		t.Fatal(err)
	}
	truncated := filepath.Join(dir, "truncated.qcow2")
	if err := os.WriteFile(truncated, content[:len(content)/2/512*512], 0o644); err != nil {
		t.Fatal(err)
	}
	base := serve(t, good.path, odd, withBacking, withDataFile, truncated)
	refused := refusedAddress(t)
	wrong := strings.Repeat("0123456789abcdef", 8)

	cases := []struct {
		name, url, checksum string
		mentions            []string
	}{
		{"bad-404", base + "/missing.raw", "", []string{"404"}},
		{"bad-refused", "http://" + refused + "/image.raw", "", []string{"connection refused"}},
		{"bad-checksum", base + "/" + filepath.Base(good.path), wrong, []string{"checksum", wrong[:16], good.checksum[:16]}},
		{"bad-odd-size", base + "/odd.raw", "", []string{"512", fmt.Sprint(1*mib + 100)}},
		{"bad-backing-file", base + "/with-backing.qcow2", "", []string{"backing file"}},
		{"bad-data-file", base + "/with-data-file.qcow2", "", []string{"external data file"}},
		{"bad-truncated", base + "/truncated.qcow2", "", []string{"qcow2"}},
	}
	// All at once: each waits for its own reason.
	for _, c := range cases {
		i.apply(t, imageYAML(c.name, c.url, c.checksum, 1))
		removeImage(t, i, c.name)
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			var object imageObject
			object = until(t, i, 30*time.Second, "backingimage", c.name, "says why it is not ready", func(o imageObject) bool {
				ready := conditionOf(o.Status.Conditions, "Ready")
				return ready.Status == "False" && says(ready.Message, c.mentions)
			})
			ready := conditionOf(object.Status.Conditions, "Ready")
			// A connection that is refused is tried again by the data source itself before the attempt counts as failed.
			if !strings.HasPrefix(ready.Reason, "DataSource") || ready.NextRetryTime == "" || ready.Hint == "" {
				t.Errorf("want a reason DataSource…, the next attempt and a hint: %+v", ready)
			}
			text, _ := json.Marshal(object.Status)
			if strings.Contains(string(text), `"state":"ready"`) {
				t.Errorf("a copy is ready: %s", text)
			}
			mentions(t, "why", i.why("backingimage", c.name), append(c.mentions, c.name, "next attempt")...)
			_, stderr, code := i.run("", "image", "wait", c.name, "--timeout", "200ms")
			if code == 0 {
				t.Error("`image wait` says that it is ready")
			}
			mentions(t, "image wait", stderr, c.mentions...)
			if files, _ := filepath.Glob(i.path("nodes", "*", "*", "backing-images", c.name+"-*", "backing")); len(files) > 0 {
				t.Errorf("there is a copy: %v", files)
			}
			noTemporaryFiles(t, i, c.name)
			i.cli(t, "delete", "backingimage", c.name)
			untilGone(t, i, 20*time.Second, "backingimage", c.name)
			nothingLeftOf(t, i, c.name, "none-"+c.name)
		})
	}
	noTemporaryFiles(t, i, "bad")
}

func says(text string, parts []string) bool {
	for _, part := range parts {
		if !strings.Contains(strings.ToLower(text), strings.ToLower(part)) {
			return false
		}
	}
	return true
}

// refusedAddress is an address where nobody listens.
func refusedAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// The same bytes are accepted when asked to pad them.
func TestPadToSectorAcceptsAnOddSize(t *testing.T) {
	i := sharedInstance(t)
	odd := filepath.Join(t.TempDir(), "padded.raw")
	if err := os.WriteFile(odd, randomBytes(4, 1*mib+100), 0o644); err != nil {
		t.Fatal(err)
	}
	yaml := strings.Replace(imageYAML("padded", serve(t, odd)+"/padded.raw", "", 1), "    url:", "    padToSector: \"true\"\n    url:", 1)
	i.apply(t, yaml)
	removeImage(t, i, "padded")
	if o := untilImageReady(t, i, "padded"); o.Status.Size != 1*mib+512 {
		t.Errorf("the padded image has %d bytes, want %d", o.Status.Size, 1*mib+512)
	}
}

// A volume on an image that does not come waits, and says for what.
func TestVolumeOnAnImageThatDoesNotComeSaysWhy(t *testing.T) {
	i := sharedInstance(t)
	base := serve(t)
	removeImage(t, i, "never")
	volume := createVolume(t, i, createRequest("waits", 32*mib, imageParameters("never", base+"/nothing.raw", "", 1)))
	until(t, i, 30*time.Second, "backingimage", "never", "says why", func(o imageObject) bool {
		return says(conditionOf(o.Status.Conditions, "Ready").Message, []string{"404"})
	})
	mentions(t, "why", i.why("volume", volume.VolumeId), "never", "404")
}
