package sanitytests

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The tour of the README and the use of Longhorn's tools in it, run as the script that it is: only the image's address and the mount
// point are ours.
func TestTourOfTheReadme(t *testing.T) {
	i := ownInstance(t, 3)
	image := ext4Image(t, 16).compressedQcow2(t)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	dir, mount := t.TempDir(), i.mountPoint(t)
	if err := os.Symlink(absolute(t, i.binary), filepath.Join(dir, "backing-image-csi")); err != nil {
		t.Fatal(err)
	}

	_, tour, _ := strings.Cut(string(readAll(t, readme)), "\n## A tour\n")
	_, tour, _ = strings.Cut(tour, "\n# An image.")
	tour, _, found := strings.Cut(tour, "\n```\n")
	mounting := "volume mount my-claim --node node-1 /tmp/my-claim\n"
	if !found || !strings.Contains(tour, mounting) || strings.Count(tour, "\nbacking-image-csi ") < 12 {
		t.Fatalf("is that the tour?\n%s", tour)
	}
	_, tools, _ := strings.Cut(string(readAll(t, readme)), "\n**Longhorn's own tools.**")
	_, tools, _ = strings.Cut(tools, "```sh\n")
	tools, _, found = strings.Cut(tools, "```\n")
	const end = "\n# Away with it."
	if !found || !strings.Contains(tools, "./backing-image-manager --url ") || strings.Count(tour, end) != 1 {
		t.Fatalf("are those the tools?\n%s", tools)
	}
	listed := filepath.Join(dir, "listed")
	tools = strings.ReplaceAll(tools, " backing-image list\n", " backing-image list > "+listed+"\n")
	seen := filepath.Join(dir, "seen")
	script := strings.NewReplacer(
		"https://example.com/alpine.qcow2", url,
		mounting, "volume mount my-claim --node node-1 "+mount+"\ncp -r "+mount+" "+seen+"\n",
		"/tmp/my-claim", mount,
		end, "\n"+tools+end,
	).Replace(tour)

	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	command := exec.CommandContext(ctx, "bash", "-euxo", "pipefail", "-c", "#"+script)
	command.Env = append(os.Environ(), "BACKING_IMAGE_CSI_SERVER=http://"+i.listen, "PATH="+dir+":"+os.Getenv("PATH"))
	command.Dir = dir
	output, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	image.verify(t, seen)
	mentions(t, "what Longhorn's tool lists", string(readAll(t, listed)), "alpine", "ready")
}

func absolute(t testing.TB, path string) string {
	t.Helper()
	whole, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return whole
}
