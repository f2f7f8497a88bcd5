package sanitytests

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Called by the name of Longhorn's tool, the binary is that tool: it lists the files of a manager as JSON.
func TestBackingImageManagerCommand(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	i.apply(t, imageYAML("by-command", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 1))
	removeImage(t, i, "by-command")
	object := untilImageReady(t, i, "by-command")

	link := filepath.Join(t.TempDir(), "backing-image-manager")
	if err := os.Symlink(i.binary, link); err != nil {
		t.Fatal(err)
	}
	for disk := range object.Status.DiskFileStatusMap {
		address := managerOf(t, i, disk).Status.IP + ":8000"
		output, err := exec.Command(link, "--url", address, "backing-image", "list").Output()
		if err != nil {
			t.Fatalf("backing-image list: %v", err)
		}
		var files map[string]struct {
			Name   string `json:"name"`
			UUID   string `json:"uuid"`
			Size   int64  `json:"size"`
			Status struct {
				State           string `json:"state"`
				CurrentChecksum string `json:"currentChecksum"`
			} `json:"status"`
		}
		if err := json.Unmarshal(output, &files); err != nil {
			t.Fatalf("%v in\n%s", err, output)
		}
		file, found := files["by-command"]
		if !found || file.UUID != object.Status.UUID || file.Size != 16*mib || file.Status.State != "ready" || file.Status.CurrentChecksum != image.checksum {
			t.Errorf("want the ready copy, got %s", output)
		}
		missing := exec.Command(link, "--url", address, "backing-image", "get", "--name", "by-command", "--uuid", "00000000")
		if output, err := missing.CombinedOutput(); err == nil {
			t.Errorf("get of an unknown uuid succeeded: %s", output)
		}
	}
}
