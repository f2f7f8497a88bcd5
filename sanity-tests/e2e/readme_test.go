// The tour of the README on Kubernetes, run as the script that it is.
package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Only the address of the image and the name of the pod's program are ours.
func TestTourOfTheReadmeOnKubernetes(t *testing.T) {
	flow(t)
	image := newImage(t, 32)
	text, err := os.ReadFile(filepath.Join(c.root, "README.md"))
	must(t, err)
	_, tour, begins := strings.Cut(string(text), "\n# An image, a class whose volumes begin with it")
	tour, _, ends := strings.Cut(tour, "\n```\n")
	const url, pod, shown = "https://example.com/data-set.qcow2", "image: busybox\n", "kubectl exec my-pod -- ls /data\n"
	if !begins || !ends || !strings.Contains(tour, url) || !strings.Contains(tour, pod) || !strings.Contains(tour, shown) {
		t.Fatalf("is that the tour?\n%s", tour)
	}
	tour = strings.NewReplacer(url, image.url, pod, "image: test.local/busybox:1\n").Replace(tour)
	tools := t.TempDir()
	kubectl := "#!/bin/sh\nexec " + filepath.Join(c.root, "sanity-tests/cluster/cluster.sh") + " kubectl \"$@\"\n"
	must(t, os.WriteFile(filepath.Join(tools, "kubectl"), []byte(kubectl), 0o755))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	command := exec.CommandContext(ctx, "bash", "-euxo", "pipefail", "-c", "#"+tour)
	command.Env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"))
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, expected := range []string{"\nhello.txt\n", "backingimage.longhorn.io/data-set condition met", "pod/my-pod condition met"} {
		if !strings.Contains(string(out), expected) {
			t.Errorf("the tour shows no `%s`:\n%s", strings.TrimSpace(expected), out)
		}
	}
}
