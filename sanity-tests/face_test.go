package sanitytests

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"sigs.k8s.io/yaml"
)

// What scripts and other programs rely on: sockets, HTTP endpoints, files, forms of output, exit codes.
func TestFaceThatOthersRelyOn(t *testing.T) {
	i := sharedInstance(t)

	t.Run("every socket answers and names the driver", func(t *testing.T) {
		for _, socket := range []string{"controller.sock", "node-1.sock", "node-2.sock", "node-3.sock"} {
			identity := csi.NewIdentityClient(i.dial(t, socket))
			info, err := identity.GetPluginInfo(call(t), &csi.GetPluginInfoRequest{})
			if err != nil || info.Name != "driver.longhorn.io" || info.VendorVersion == "" {
				t.Errorf("%s: %v, %v", socket, info, err)
			}
			if _, err := identity.Probe(call(t), &csi.ProbeRequest{}); err != nil {
				t.Errorf("%s: %v", socket, err)
			}
		}
	})
	t.Run("health and metrics", func(t *testing.T) {
		for path, part := range map[string]string{"/healthz": "", "/metrics": "# TYPE backing_image_"} {
			response, err := http.Get("http://" + i.listen + path)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(response.Body)
			response.Body.Close()
			if response.StatusCode != http.StatusOK || !strings.Contains(string(body), part) {
				t.Errorf("%s: %s\n%s", path, response.Status, body)
			}
		}
	})
	t.Run("objects look as in Kubernetes", func(t *testing.T) {
		nodes := list[object](t, i, "node")
		if len(nodes) != 3 || nodes[0].APIVersion != "longhorn.io/v1beta2" || nodes[0].Kind != "Node" || nodes[0].Metadata.Namespace != "longhorn-system" {
			t.Errorf("nodes: %+v", nodes)
		}
		var fromYAML object
		if err := yaml.Unmarshal([]byte(i.cli(t, "get", "node", "node-1", "-o", "yaml")), &fromYAML); err != nil || fromYAML.Metadata.Name != "node-1" {
			t.Errorf("yaml: %+v, %v", fromYAML, err)
		}
		mentions(t, "the table", i.cli(t, "get", "node", "-o", "wide"), "NAME", "node-1", "node-3")
	})
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	volume := newClaim(t, i, "face", image, 32, 1, "Block")
	untilImageReady(t, i, "face")
	t.Run("exit codes", func(t *testing.T) {
		for _, c := range []struct {
			want int
			args []string
		}{
			{0, []string{"image", "wait", "face"}},
			{0, []string{"why", "volume", volume}},
			{2, []string{"image", "create", "face-2", "--url", "file:///etc/passwd"}},
			{3, []string{"image", "wait", "absent"}},
			{4, []string{"image", "create", "face", "--url", url}},
			{5, []string{"delete", "backingimage", "face", "--timeout", "2s"}},
			{7, []string{"--server", "http://" + refusedAddress(t), "get", "nodes"}},
			{3, []string{"get", "backingimage", "absent"}},
			{3, []string{"why", "backingimage", "absent"}},
			{2, []string{"get", "no-such-kind"}},
			{2, []string{"no-such-command"}},
			{3, []string{"delete", "backingimage", "absent"}},
		} {
			stdout, stderr, code := i.run("", c.args...)
			if code != c.want || code != 0 && stderr == "" {
				t.Errorf("%v: exit code %d, want %d\n%s%s", c.args, code, c.want, stdout, stderr)
			}
		}
	})
	t.Run("images and volumes for people", func(t *testing.T) {
		i.cli(t, "image", "create", "face-3", "--url", url, "--checksum", image.checksum, "--min-copies", "2", "--wait")
		removeImage(t, i, "face-3")
		mentions(t, "image list", i.cli(t, "image", "list", "face-3"), "node-", "ready", image.checksum)
		device := strings.TrimSpace(i.cli(t, "volume", "attach", "face", "--node", "node-1"))
		if info, err := os.Stat(device); err != nil || info.Mode()&os.ModeDevice == 0 {
			t.Errorf("`volume attach` printed `%s`, which is no device: %v", device, err)
		}
		mentions(t, "volume list", i.cli(t, "volume", "list"), volume, "attached", "node-1", device)
		i.cli(t, "volume", "detach", "face")
		if _, err := os.Stat(device); err == nil && len(loopDevices(i.dir)) > 0 {
			t.Errorf("after the detachment there are %v", loopDevices(i.dir))
		}
	})
	t.Run("the server can be named by a flag", func(t *testing.T) {
		command := exec.Command(i.binary, "--server", "http://"+i.listen, "get", "nodes", "-o", "name")
		command.Env = []string{"BACKING_IMAGE_CSI_SERVER=http://" + refusedAddress(t)}
		if output, err := command.CombinedOutput(); err != nil || !strings.Contains(string(output), "node-1") {
			t.Errorf("%v\n%s", err, output)
		}
	})
	t.Run("wrong manifests change nothing", func(t *testing.T) {
		for name, manifest := range map[string]string{
			"checksum":  imageYAML("wrong-manifest", "http://127.0.0.1/x", "abc", 1),
			"name":      imageYAML("Wrong_Manifest!", "http://127.0.0.1/x", "", 1),
			"no source": "apiVersion: longhorn.io/v1beta2\nkind: BackingImage\nmetadata:\n  name: wrong-manifest\nspec:\n  sourceType: download\n",
			"kind":      "apiVersion: v1\nkind: Gadget\nmetadata:\n  name: wrong-manifest\n",
			"no YAML":   "{{{",
		} {
			file := fmt.Sprintf("%s/wrong-%s.yaml", t.TempDir(), strings.ReplaceAll(name, " ", "-"))
			if err := os.WriteFile(file, []byte(manifest), 0o644); err != nil {
				t.Fatal(err)
			}
			stdout, stderr, code := i.run("", "apply", "-f", file)
			if code != 2 || stderr == "" {
				t.Errorf("%s: exit code %d, want 2\n%s%s", name, code, stdout, stderr)
			}
		}
		if _, notFound, err := tryGet[imageObject](i, "backingimage", "wrong-manifest"); err != nil || !notFound {
			t.Errorf("an image came to be (%v)", err)
		}
	})
	t.Run("disks carry Longhorn's configuration", func(t *testing.T) {
		for node := 1; node <= 3; node++ {
			if uuid := diskUUID(t, i.disk(node)); len(uuid) != 36 {
				t.Errorf("node-%d: disk uuid `%s`", node, uuid)
			}
		}
	})
}

// Several disks on a node: each has a directory of its own, and the replicas of a volume are on distinct ones.
func TestDisksPerNode(t *testing.T) {
	i := ownInstance(t, 1, "--disks-per-node", "2")
	for _, disk := range []string{"disk-1", "disk-2"} {
		diskUUID(t, i.path("nodes", "node-1", disk))
	}
	volume := newClaim(t, i, "disks", ext4Image(t, 16), 32, 2, "Block")
	i.cli(t, "volume", "attach", "disks", "--node", "node-1")
	untilRobust(t, i, volume, "healthy")
	replicas := replicasOf(t, i, volume)
	if len(replicas) != 2 || replicas[0].Spec.DiskPath == replicas[1].Spec.DiskPath {
		t.Errorf("want replicas on both disks: %+v", replicas)
	}
	i.cli(t, "volume", "detach", "disks")
}
