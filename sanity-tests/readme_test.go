package sanitytests

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The commands of the README's tour, in their order, do what it says.
func TestTourOfTheReadme(t *testing.T) {
	i := ownInstance(t, 3)
	image := ext4Image(t, 16).compressedQcow2(t)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	dir := t.TempDir()
	example := func(name string, replacements ...string) string {
		content := strings.NewReplacer(replacements...).Replace(string(readAll(t, "../deploy/examples/"+name)))
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	class := example("storage-class.yaml", "https://backing-image-example.s3-region.amazonaws.com/test-backing-image", url, "SHA512 checksum of the backing image", image.checksum)
	claim := example("pvc.yaml", "name: longhorn-backing-image-example\n  namespace", "name: my-claim\n  namespace")
	mount := i.mountPoint(t)

	_, tour, _ := strings.Cut(string(readAll(t, readme)), "\n## A tour\n")
	tour, _, _ = strings.Cut(tour, "\n## ")
	ran := 0
	for _, line := range regexp.MustCompile(`(?m)^backing-image-csi (.*)$`).FindAllStringSubmatch(tour, -1) {
		command, _, _ := strings.Cut(line[1], "#")
		args := strings.Fields(command)
		if args[0] == "standalone" {
			continue
		}
		for n, arg := range args {
			switch arg {
			case "https://example.com/alpine.qcow2":
				args[n] = url
			case "storage-class.yaml":
				args[n] = class
			case "pvc.yaml":
				args[n] = claim
			case "/mnt":
				args[n] = mount
			}
		}
		stdout, stderr, code := i.run("", args...)
		if code != 0 {
			t.Fatalf("%s: exit code %d\n%s%s", command, code, stdout, stderr)
		}
		t.Logf("$ %s\n%s", command, stdout)
		if args[0] == "volume" && args[1] == "mount" {
			image.verify(t, mount)
		}
		ran++
	}
	if ran < 11 {
		t.Errorf("only %d commands: is that the tour?", ran)
	}
}
