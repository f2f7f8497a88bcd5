package sanitytests

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// sourceFaults: the address or what answers there.
func sourceFaults(t *testing.T, image imageFile) []fault {
	address := func(url string) func(p *patient) string {
		return func(p *patient) string { return imageYAML(p.name, url, p.image.checksum, p.copies) }
	}
	// A server that has a fault until it is healed.
	heals := func(broken http.HandlerFunc) (begin func(p *patient) string, inject func(t *testing.T, p *patient) func()) {
		var healed atomic.Bool
		url, _ := sourceServer(t, func(w http.ResponseWriter, r *http.Request) {
			if healed.Load() {
				http.ServeFile(w, r, image.path)
			} else {
				broken(w, r)
			}
		})
		address := url + "/" + filepath.Base(image.path)
		begin = func(p *patient) string {
			p.url = address
			return p.yaml()
		}
		return begin, func(*testing.T, *patient) func() { return func() { healed.Store(true) } }
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	errorBegin, errorInject := heals(status(http.StatusInternalServerError))
	busyBegin, busyInject := heals(status(http.StatusTooManyRequests))
	silentBegin, silentInject := heals(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "16777216")
		w.Write(make([]byte, 1000))
		w.(counting).ResponseWriter.(http.Flusher).Flush()
		// A server that is healed answers the next request; this one stays silent.
		<-r.Context().Done()
	})
	files := serve(t, image.path)
	loop, _ := sourceServer(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/again", http.StatusFound) })
	backed := filepath.Join(t.TempDir(), "backed.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image.path, backed)
	hostile := serve(t, backed)
	return []fault{
		{name: "server error", copies: 1, begin: errorBegin, inject: errorInject, says: []string{"answered 500"}},
		{name: "too many requests", copies: 1, begin: busyBegin, inject: busyInject, says: []string{"answered 429"}},
		{name: "silent source", copies: 1, begin: silentBegin, inject: silentInject, says: []string{"says nothing"}},
		{name: "unknown host", copies: 1, begin: address("http://no-such-host.invalid/x.raw"), says: []string{"cannot connect"}},
		{name: "missing file", copies: 1, begin: address(files + "/missing.raw"), says: []string{"answered 404"}},
		{name: "redirects without end", copies: 1, begin: address(loop + "/x.raw"), says: []string{"more than 10 redirects"}},
		{name: "hostile file", copies: 1, begin: func(p *patient) string {
			return imageYAML(p.name, hostile+"/backed.qcow2", "", p.copies)
		}, says: []string{"backing file"}},
		{name: "wrong checksum", copies: 1, begin: func(p *patient) string {
			return imageYAML(p.name, p.url, strings.Repeat("ab", 64), p.copies)
		}, says: []string{"SHA-512", "was expected"}},
		{name: "refused connection", copies: 1, begin: func(p *patient) string {
			return imageYAML(p.name, "http://"+refusedAddress(t)+"/x.raw", p.image.checksum, p.copies)
		}, says: []string{"refused"}},
	}
}

// fileFaults: the files of a copy. With one copy it waits for the recovery, so that it can be looked at.
func fileFaults() []fault {
	lost := []string{"Recovering", "the file is gone from the disk"}
	harm := func(do func(path string) error) func(t *testing.T, p *patient) func() {
		return func(t *testing.T, p *patient) func() {
			if err := do(p.path(t)); err != nil {
				t.Fatal(err)
			}
			return func() {}
		}
	}
	write := func(path string, keepTime bool) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		file, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer file.Close()
		if _, err := file.WriteAt([]byte("damage"), 5*mib); err != nil || !keepTime {
			return err
		}
		return os.Chtimes(path, info.ModTime(), info.ModTime())
	}
	return []fault{
		{name: "file removed", copies: 1, inject: harm(os.Remove), says: lost, why: lost[1:]},
		{name: "directory removed", copies: 1, inject: harm(func(path string) error { return os.RemoveAll(filepath.Dir(path)) }), says: lost, why: lost[1:]},
		{name: "directory moved away", copies: 1, inject: harm(func(path string) error {
			return os.Rename(filepath.Dir(path), filepath.Join(filepath.Dir(path), "..", "..", "away-"+filepath.Base(filepath.Dir(path))))
		}), says: lost, why: lost[1:]},
		{name: "bytes overwritten", copies: 1, inject: harm(func(path string) error { return write(path, false) }), says: []string{"Recovering", "1 of 16 chunks"}, why: []string{"1 of 16 chunks"}},
		{name: "bytes overwritten, time kept", copies: 1, inject: harm(func(path string) error { return write(path, true) }), says: []string{"Recovering", "1 of 16 chunks"}, why: []string{"1 of 16 chunks"}},
		{name: "file cut short", copies: 1, inject: harm(func(path string) error { return os.Truncate(path, 3*mib) }), says: []string{"Recovering", "13 of 16 chunks"}, why: []string{"13 of 16 chunks"}},
		{name: "config lost", copies: 1, passing: true, inject: harm(func(path string) error { return os.Remove(path + ".cfg") }), says: []string{"verifiedAt"}},
		{name: "manifest lost", copies: 1, passing: true, inject: harm(func(path string) error { return os.Remove(path + ".chunks") }), says: []string{"verifiedAt"}},
		{name: "time changed", copies: 1, passing: true, inject: harm(func(path string) error { return os.Chtimes(path, time.Now(), time.Unix(1, 0)) }), says: []string{"verifiedAt"}},
		{name: "one of three removed", copies: 3, passing: true, inject: harm(os.Remove), says: []string{"the file is gone from the disk"}},
	}
}

// wishFaults: what is wished cannot be.
func wishFaults() []fault {
	return []fault{
		{name: "no disk with the tag", copies: 1, begin: func(p *patient) string {
			return p.yaml() + "  nodeSelector: [no-such-tag]\n"
		}, inject: func(t *testing.T, p *patient) func() {
			return func() { p.i.apply(t, p.yaml()+"  nodeSelector: []\n") }
		}, says: []string{"NoEligibleDisk", "no-such-tag"}, why: []string{"no-such-tag", "You can:"}},
		{name: "more copies than disks", copies: 3, begin: func(p *patient) string {
			return imageYAML(p.name, p.url, p.image.checksum, 5)
		}, says: []string{"FewerCopies", "no further disk is eligible"}, why: []string{"no further disk is eligible"}},
	}
}

// diskFaults: of the disk of node-3, which has a copy.
func diskFaults(t *testing.T) []fault {
	disk := func(harm func(t *testing.T, dir string) (undo func())) func(t *testing.T, p *patient) func() {
		return func(t *testing.T, p *patient) func() { return harm(t, p.i.disk(3)) }
	}
	file := func(dir string) string { return filepath.Join(dir, "longhorn-disk.cfg") }
	return []fault{
		{name: "disk away", copies: 3, inject: disk(rename), says: []string{"unknown", "is not there"}},
		{name: "disk file removed", copies: 3, inject: disk(func(t *testing.T, dir string) func() { return rename(t, file(dir)) }), says: []string{"unknown", "longhorn-disk.cfg` is gone"}},
		{name: "disk file damaged", copies: 3, inject: disk(func(t *testing.T, dir string) func() { return rewrite(t, file(dir), "{") }), says: []string{"unknown", "is not understood"}},
		{name: "another disk in its place", copies: 3, inject: disk(func(t *testing.T, dir string) func() {
			return rewrite(t, file(dir), `{"diskName":"disk-1","diskUUID":"9b2d6f1e-0000-4000-8000-000000000000","diskDriver":"","state":"ready"}`)
		}), says: []string{"unknown", "now holds disk 9b2d6f1e"}},
		{name: "all images moved away", copies: 3, inject: disk(func(t *testing.T, dir string) func() {
			if err := os.Rename(filepath.Join(dir, "backing-images"), filepath.Join(dir, "old-images")); err != nil {
				t.Fatal(err)
			}
			return func() {}
		}), says: []string{"the file is gone from the disk"}, passing: true},
		{name: "disk read-only", copies: 3, inject: disk(readOnly), says: []string{"unknown", "mounted read-only"}},
		{name: "first copy may not be written", copies: 1, begin: func(p *patient) string {
			immutable(t, p.i, func(string) bool { return true })
			return p.yaml()
		}, inject: mutable, says: []string{"Operation not permitted"}},
		{name: "further copies may not be written", copies: 3, begin: func(p *patient) string {
			p.i.apply(t, imageYAML(p.name, p.url, p.image.checksum, 1))
			untilImageReady(t, p.i, p.name)
			immutable(t, p.i, func(disk string) bool { return !strings.HasPrefix(p.path(t), disk) })
			return p.yaml()
		}, inject: mutable, says: []string{"failed", "Operation not permitted"}, why: []string{"Operation not permitted", "next attempt"}},
		{name: "disk taken off its node", copies: 3, inject: func(t *testing.T, p *patient) func() {
			var disks any
			mustPut(t, p.i, "node", "node-3", func(o map[string]any) {
				disks = spec(o)["disks"]
				spec(o)["disks"] = map[string]any{}
			})
			return func() { mustPut(t, p.i, "node", "node-3", func(o map[string]any) { spec(o)["disks"] = disks }) }
		}, says: []string{"unknown", "no node has a disk"}, why: []string{"no node has a disk"}},
		{name: "tag on no node", copies: 1, begin: func(p *patient) string {
			return p.yaml() + "  nodeSelector: [spare]\n"
		}, inject: func(t *testing.T, p *patient) func() {
			tags := func(tags func([]any) []any) {
				mustPut(t, p.i, "node", "node-3", func(o map[string]any) { spec(o)["tags"] = tags(spec(o)["tags"].([]any)) })
			}
			return func() {
				tags(func(all []any) []any { return append(all, "spare") })
				t.Cleanup(func() {
					tags(func(all []any) []any { return slices.DeleteFunc(all, func(tag any) bool { return tag == "spare" }) })
				})
			}
		}, says: []string{"NoEligibleDisk", "lacks the tag `spare`"}, why: []string{"lacks the tag `spare`"}},
		{name: "disk without room", copies: 3, begin: func(p *patient) string {
			p.i.apply(t, reservedNode(p, 3, 1<<60))
			until(t, p.i, namedWithin, "node", "node-3", "has no room on its disk", func(o map[string]any) bool {
				text, _ := json.Marshal(o)
				return strings.Contains(string(text), "DiskPressure")
			})
			return p.yaml()
		}, inject: func(t *testing.T, p *patient) func() {
			return func() { p.i.apply(t, reservedNode(p, 3, 0)) }
		}, says: []string{"FewerCopies", "are reserved"}, why: []string{"are reserved"}},
		{name: "no copies by themselves", copies: 3, begin: func(p *patient) string {
			setting(t, p.i, "concurrent-backing-image-replenish-per-node-limit", "0")
			return p.yaml()
		}, inject: func(t *testing.T, p *patient) func() {
			return func() { setting(t, p.i, "concurrent-backing-image-replenish-per-node-limit", "5") }
		}, says: []string{"FewerCopies", "replenish-per-node-limit is 0"}, why: []string{"replenish-per-node-limit is 0"}},
		{name: "nowhere to go", copies: 3, inject: func(t *testing.T, p *patient) func() {
			evict := func(wished bool) {
				p.i.apply(t, nodeHead(3)+fmt.Sprintf("  allowScheduling: %v\n  evictionRequested: %v\n", !wished, wished))
			}
			evict(true)
			return func() { evict(false) }
		}, says: []string{"FewerCopies", "although eviction is requested"}, why: []string{"although eviction is requested"}},
	}
}

// immutable makes nobody able to write copies to some disks.
func immutable(t *testing.T, i *instance, of func(disk string) bool) {
	t.Helper()
	for node := 1; node <= 3; node++ {
		dir := filepath.Join(i.disk(node), "backing-images")
		must(t, "mkdir", "-p", dir)
		if of(i.disk(node)) {
			must(t, "chattr", "+i", dir)
			t.Cleanup(func() { exec.Command("chattr", "-i", dir).Run() })
		}
	}
}

// mutable takes that back at the end of the fault.
func mutable(t *testing.T, p *patient) (undo func()) {
	return func() {
		for node := 1; node <= 3; node++ {
			must(t, "chattr", "-i", filepath.Join(p.i.disk(node), "backing-images"))
		}
	}
}

func nodeHead(node int) string {
	return fmt.Sprintf("apiVersion: longhorn.io/v1beta2\nkind: Node\nmetadata:\n  name: node-%d\n  namespace: longhorn-system\nspec:\n", node)
}

// reservedNode is a node whose disk has so many bytes reserved.
func reservedNode(p *patient, node int, bytes int64) string {
	return nodeHead(node) + fmt.Sprintf("  disks:\n    disk-1:\n      path: %s\n      allowScheduling: true\n      storageReserved: %d\n", p.i.disk(node), bytes)
}

// readOnly mounts a directory over itself, read-only.
func readOnly(t *testing.T, dir string) (undo func()) {
	t.Helper()
	if err := syscall.Mount(dir, dir, "", syscall.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	undo = sync.OnceFunc(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(undo)
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_BIND|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	return undo
}

// processFaults: agents and data sources.
func processFaults(t *testing.T) []fault {
	agent := func(signal syscall.Signal) func(t *testing.T, p *patient) func() {
		return func(t *testing.T, p *patient) func() {
			pid := agentsOf(t, p.i, p.on(t, 2))[0].pid
			if err := syscall.Kill(pid, signal); err != nil {
				t.Fatal(err)
			}
			return func() { syscall.Kill(pid, syscall.SIGCONT) }
		}
	}
	// Half of what is downloaded has come.
	var half <-chan struct{}
	source := func(signal syscall.Signal, release *func()) func(t *testing.T, p *patient) func() {
		return func(t *testing.T, p *patient) func() {
			select {
			case <-half:
			case <-time.After(readyWithin):
				t.Fatal("no download began")
			}
			pid := 0
			eventually(t, 10*time.Second, "its data source runs", func() (bool, string) {
				for _, one := range processesOf(p.i.dir) {
					if len(one.args) > 1 && one.args[1] == "data-source" {
						pid = one.pid
					}
				}
				return pid != 0, ""
			})
			if err := syscall.Kill(pid, signal); err != nil {
				t.Fatal(err)
			}
			return func() {
				syscall.Kill(pid, syscall.SIGCONT)
				(*release)()
			}
		}
	}
	held := func() (begin func(p *patient) string, release *func()) {
		release = new(func())
		return func(p *patient) string {
			p.url, half, *release = heldServer(t, p.image.path)
			return p.yaml()
		}, release
	}
	// The only agent from which further copies could come.
	var peer int
	silentPeer := fault{name: "peer that says nothing", copies: 3, begin: func(p *patient) string {
		p.i.apply(t, imageYAML(p.name, p.url, p.image.checksum, 1))
		untilImageReady(t, p.i, p.name)
		peer = agentsOf(t, p.i, p.path(t))[0].pid
		if err := syscall.Kill(peer, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { syscall.Kill(peer, syscall.SIGCONT) })
		return p.yaml()
	}, inject: func(*testing.T, *patient) func() {
		return func() { syscall.Kill(peer, syscall.SIGCONT) }
	}, says: []string{"unknown", "no answer"}}
	stopped, stoppedRelease := held()
	return []fault{
		{name: "agent that says nothing", copies: 3, inject: agent(syscall.SIGSTOP), says: []string{"unknown", "no answer"}},
		silentPeer,
		{name: "agent killed", copies: 3, inject: agent(syscall.SIGKILL), says: []string{"unknown"}, passing: true},
		{name: "data source that says nothing", copies: 1, begin: stopped, inject: source(syscall.SIGSTOP, stoppedRelease), says: []string{"does not answer"}},
	}
}
