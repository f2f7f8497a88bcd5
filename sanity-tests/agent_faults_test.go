package sanitytests

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// agents finds the processes of an instance that own the image files of a disk.
func agents(i *instance, diskPath, diskUUID string) []process {
	return slices.DeleteFunc(processesOf(i.dir), func(p process) bool {
		line := p.String()
		return !slices.Contains(p.args, "backing-image-manager") || !strings.Contains(line, diskPath) && !strings.Contains(line, diskUUID)
	})
}

// The agent of a disk dies as soon as it begins to receive a copy: another one takes over and the copy becomes ready.
func TestKilledAgentFinishesItsSync(t *testing.T) {
	i := sharedInstance(t)
	large := filepath.Join(t.TempDir(), "large.raw")
	if err := os.WriteFile(large, randomBytes(11, 192*mib), 0o644); err != nil {
		t.Fatal(err)
	}
	sum := checksumOf(t, large)
	i.apply(t, imageYAML("resync", serve(t, large)+"/large.raw", sum, 3))
	removeImage(t, i, "resync")

	var killed string
	eventually(t, 60*time.Second, "an agent receives a copy", func() (bool, string) {
		found, _ := filepath.Glob(i.path("nodes", "*", "disk-1", "backing-images", "resync-*", "backing.tmp*"))
		for _, file := range found {
			disk := strings.SplitAfter(file, "/disk-1")[0]
			uuid := diskUUID(t, disk)
			for _, agent := range agents(i, disk, uuid) {
				killProcess(t, agent.pid)
				killed = uuid
				return true, ""
			}
		}
		o, _, err := tryGet[imageObject](i, "backingimage", "resync")
		if len(readyCopies(o)) == 3 {
			return true, ""
		}
		return false, i.why("backingimage", "resync") + errorText(err)
	})
	if killed == "" {
		t.Log("all copies were ready before an agent could be killed; only their content is checked")
	}
	object := until(t, i, 90*time.Second, "backingimage", "resync", "has three ready copies", func(o imageObject) bool {
		return len(readyCopies(o)) == 3
	})
	for _, path := range copyPaths(i, "resync", object.Status.UUID) {
		if got := checksumOf(t, path); got != sum {
			t.Errorf("%s: SHA-512 %s, want %s", path, got[:16], sum[:16])
		}
	}
	noTemporaryFiles(t, i, "resync")
}

// The data source dies in the middle of a download: it goes on with what it has, or begins again, and the image becomes ready.
func TestKilledDataSourceFinishesItsDownload(t *testing.T) {
	i := sharedInstance(t)
	large := filepath.Join(t.TempDir(), "large.raw")
	if err := os.WriteFile(large, randomBytes(12, 64*mib), 0o644); err != nil {
		t.Fatal(err)
	}
	sum := checksumOf(t, large)
	half, release := make(chan struct{}), make(chan struct{})
	var begun atomic.Bool
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || begun.Swap(true) {
			http.ServeFile(w, r, large)
			return
		}
		// The first download gets one half and then waits until it is dead.
		content, _ := os.ReadFile(large)
		w.Header().Set("Content-Length", "67108864")
		w.Header().Set("Accept-Ranges", "bytes")
		w.Write(content[:len(content)/2])
		w.(http.Flusher).Flush()
		close(half)
		<-release
	}))
	t.Cleanup(server.Close)
	t.Cleanup(func() {
		select {
		case <-release:
		default:
			close(release)
		}
	})

	i.apply(t, imageYAML("redownload", server.URL+"/large.raw", sum, 1))
	removeImage(t, i, "redownload")
	select {
	case <-half:
	case <-time.After(30 * time.Second):
		t.Fatalf("the download did not begin: %s", i.why("backingimage", "redownload"))
	}
	sources := slices.DeleteFunc(processesOf(i.dir), func(p process) bool {
		return !slices.Contains(p.args, "data-source") || !strings.Contains(p.String(), "redownload")
	})
	if len(sources) != 1 {
		t.Fatalf("want one data source, found %v in %v", sources, processesOf(i.dir))
	}
	killProcess(t, sources[0].pid)
	close(release)
	object := until(t, i, 90*time.Second, "backingimage", "redownload", "is ready", func(o imageObject) bool {
		return conditionOf(o.Status.Conditions, "Ready").Status == "True"
	})
	if object.Status.Checksum != sum {
		t.Errorf("SHA-512 %s, want %s", object.Status.Checksum, sum)
	}
	noTemporaryFiles(t, i, "redownload")
}

func readyCopies(o imageObject) (disks []string) {
	for disk, file := range o.Status.DiskFileStatusMap {
		if file.State == "ready" {
			disks = append(disks, disk)
		}
	}
	return disks
}

func copyPaths(i *instance, image, uuid string) []string {
	paths, _ := filepath.Glob(i.path("nodes", "*", "*", "backing-images", image+"-"+uuid, "backing"))
	return paths
}

// diskUUID reads longhorn-disk.cfg.
func diskUUID(t testing.TB, disk string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(disk, "longhorn-disk.cfg"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(content), `"diskUUID"`)
	parts := strings.SplitN(rest, `"`, 3)
	if len(parts) < 3 {
		t.Fatalf("no diskUUID in %s", content)
	}
	return parts[1]
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
