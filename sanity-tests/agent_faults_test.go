package sanitytests

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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

// The agent of a disk dies in the middle of receiving a copy: another one takes over and the copy becomes ready.
func TestKilledAgentFinishesItsSync(t *testing.T) {
	i := sharedInstance(t)
	const size = 256 * mib
	large := filepath.Join(t.TempDir(), "large.raw")
	if err := os.WriteFile(large, randomBytes(11, size), 0o644); err != nil {
		t.Fatal(err)
	}
	sum := checksumOf(t, large)
	url := serve(t, large) + "/large.raw"
	i.apply(t, imageYAML("resync", url, sum, 1))
	removeImage(t, i, "resync")
	uuid := untilImageReady(t, i, "resync").Status.UUID
	copies := copyPaths(i, "resync", uuid)
	if len(copies) != 1 {
		t.Fatalf("want one copy, found %v", copies)
	}
	held := holdSync(t, i, "resync", copies[0], size, func() { i.apply(t, imageYAML("resync", url, sum, 3)) })
	for _, agent := range agentsOf(t, i, held.partial) {
		t.Logf("killing %s with %d of %d MiB", agent, chunksIn(held.partial, size), size/mib)
		killProcess(t, agent.pid)
	}
	if object := get[imageObject](t, i, "backingimage", "resync"); len(readyCopies(object)) > 2 {
		t.Fatalf("all copies were ready before the agent died: %+v", object.Status)
	}
	held.goOn(t)
	until(t, i, 90*time.Second, "backingimage", "resync", "has three ready copies", func(o imageObject) bool {
		return len(readyCopies(o)) == 3
	})
	copies = copyPaths(i, "resync", uuid)
	if len(copies) != 3 {
		t.Errorf("want three copies, found %v", copies)
	}
	for _, path := range copies {
		if got := checksumOf(t, path); got != sum {
			t.Errorf("%s: SHA-512 %s, want %s", path, got[:16], sum[:16])
		}
	}
	noTemporaryFiles(t, i, "resync")
}

// heldSync is a sync in the middle: its sender is stopped.
type heldSync struct {
	sender int
	// partial is a copy that has a part of the file.
	partial string
}

// holdSync begins a sync of a copy to other disks and holds it in the middle.
func holdSync(t *testing.T, i *instance, image, copied string, size int64, begin func()) heldSync {
	t.Helper()
	senders := agentsOf(t, i, copied)
	if len(senders) != 1 {
		t.Fatalf("want one agent of %s, found %v in %v", copied, senders, processesOf(i.dir))
	}
	// The sender gets a few milliseconds at a time, so that no receiver can be done before it is looked at.
	held := heldSync{sender: senders[0].pid}
	t.Cleanup(func() { syscall.Kill(held.sender, syscall.SIGCONT) })
	held.signal(t, syscall.SIGSTOP)
	begin()
	eventually(t, 60*time.Second, "a copy is received in part", func() (bool, string) {
		held.signal(t, syscall.SIGCONT)
		time.Sleep(5 * time.Millisecond) // poll
		held.signal(t, syscall.SIGSTOP)
		partial, _ := filepath.Glob(i.path("nodes", "*", "disk-1", "backing-images", image+"-*", "backing.tmp"))
		for _, path := range partial {
			if chunks := chunksIn(path, size); chunks > 0 && chunks < size/mib && len(agentsOf(t, i, path)) > 0 {
				held.partial = path
				return true, ""
			}
		}
		return false, fmt.Sprintf("no partial copy among %v", partial)
	})
	return held
}

func (h heldSync) signal(t *testing.T, signal syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(h.sender, signal); err != nil {
		t.Fatalf("cannot signal the sender: %v", err)
	}
}

// goOn lets the sender send.
func (h heldSync) goOn(t *testing.T) {
	t.Helper()
	h.signal(t, syscall.SIGCONT)
}

// agentsOf finds the agents of the disk on which a file is.
func agentsOf(t testing.TB, i *instance, file string) []process {
	t.Helper()
	disk, _, _ := strings.Cut(file, "/backing-images/")
	return agents(i, disk, diskUUID(t, disk))
}

// chunksIn counts the MiB of random content that a file has already.
func chunksIn(path string, size int64) (chunks int64) {
	file, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer file.Close()
	start, zero := make([]byte, 64), make([]byte, 64)
	for at := int64(0); at < size; at += mib {
		if n, _ := file.ReadAt(start, at); n == len(start) && !bytes.Equal(start, zero) {
			chunks++
		}
	}
	return chunks
}

// The data source dies in the middle of a download: the next one goes on with what was safe, and asks for the rest only.
func TestKilledDataSourceFinishesItsDownload(t *testing.T) {
	i := sharedInstance(t)
	content := randomBytes(12, 64*mib)
	large := filepath.Join(t.TempDir(), "large.raw")
	if err := os.WriteFile(large, content, 0o644); err != nil {
		t.Fatal(err)
	}
	sum := checksumOf(t, large)
	var begun atomic.Bool
	url, sent := sourceServer(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"v1"`)
		if begun.Swap(true) {
			http.ServeContent(w, r, "large.raw", time.Time{}, bytes.NewReader(content))
			return
		}
		// The first download gets one half and then waits until it is dead.
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		w.Write(content[:len(content)/2])
		w.(counting).ResponseWriter.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	i.apply(t, imageYAML("redownload", url+"/large.raw?token=hunter2", sum, 1))
	removeImage(t, i, "redownload")
	var record string
	eventually(t, 30*time.Second, "half of it is safe", func() (bool, string) {
		found, _ := filepath.Glob(i.path("nodes", "*", "disk-*", "tmp", "redownload-*.resume"))
		if len(found) == 0 {
			return false, i.why("backingimage", "redownload")
		}
		text, _ := os.ReadFile(found[0])
		record = string(text)
		return strings.Contains(record, fmt.Sprintf(`"durableBytes":%d`, 32*mib)), record
	})
	if strings.Contains(record, "hunter2") {
		t.Errorf("a secret lies on the disk: %s", record)
	}
	sources := dataSources(i, "redownload")
	if len(sources) != 1 {
		t.Fatalf("want one data source, found %v in %v", sources, processesOf(i.dir))
	}
	killProcess(t, sources[0].pid)
	object := until(t, i, 90*time.Second, "backingimage", "redownload", "is ready", func(o imageObject) bool {
		return conditionOf(o.Status.Conditions, "Ready").Status == "True"
	})
	if object.Status.Checksum != sum {
		t.Errorf("SHA-512 %s, want %s", object.Status.Checksum, sum)
	}
	copies := copyPaths(i, "redownload", object.Status.UUID)
	if len(copies) != 1 || checksumOf(t, copies[0]) != sum {
		t.Errorf("the copy is not what was served: %v", copies)
	}
	if n := int(sent.Load()); n > len(content)+mib {
		t.Errorf("%d bytes were served for an image of %d: what was safe was fetched again", n, len(content))
	}
	noTemporaryFiles(t, i, "redownload")
}

// dataSources finds the processes that prepare the first file of an image.
func dataSources(i *instance, image string) []process {
	return slices.DeleteFunc(processesOf(i.dir), func(p process) bool {
		return !slices.Contains(p.args, "data-source") || !strings.Contains(p.String(), image)
	})
}

// heldServer serves a file, but the first download gets one half (then half closes) and waits until release is called; all others get it at once.
func heldServer(t *testing.T, path string) (url string, half <-chan struct{}, release func()) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	reached, gate := make(chan struct{}), make(chan struct{})
	release = sync.OnceFunc(func() { close(gate) })
	var begun atomic.Bool
	url, _ = sourceServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || begun.Swap(true) {
			http.ServeFile(w, r, path)
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		w.Header().Set("Accept-Ranges", "bytes")
		w.Write(content[:len(content)/2])
		w.(counting).ResponseWriter.(http.Flusher).Flush()
		close(reached)
		select {
		case <-gate:
			w.Write(content[len(content)/2:])
		case <-r.Context().Done():
		}
	})
	t.Cleanup(release)
	return url + "/" + filepath.Base(path), reached, release
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
