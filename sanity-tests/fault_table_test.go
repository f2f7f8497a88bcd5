package sanitytests

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// namedWithin is how soon a fault must have named itself.
const namedWithin = 10 * time.Second

// healedWithin is how soon all must be well when it is taken away: the longest pause between two attempts by then, and the work.
const healedWithin = 60 * time.Second

// fault is one thing that goes wrong with one image.
type fault struct {
	name string
	// copies of the image; with one, nothing can be taken from another copy.
	copies int
	// begin is what the image is created with, where the fault is in that; its copies are not waited for then.
	begin func(p *patient) string
	// inject does it and returns what takes it away.
	inject func(t *testing.T, p *patient) (undo func())
	// says is what the status of the image contains then.
	says []string
	// why is what `why` contains; the same as says when there is none.
	why []string
	// passing: it heals by itself at once, so that only the status is asked for, as often as possible.
	passing bool
}

// patient is the image of a fault, on an instance of three nodes with one disk each.
type patient struct {
	i     *instance
	name  string
	image imageFile
	// url is a good address of the image.
	url    string
	copies int
	undo   func()
}

// yaml is the image as it should be.
func (p *patient) yaml() string { return imageYAML(p.name, p.url, p.image.checksum, p.copies) }

// paths are the files of its copies.
func (p *patient) paths(t *testing.T) []string {
	t.Helper()
	return copyPaths(p.i, p.name, get[imageObject](t, p.i, "backingimage", p.name).Status.UUID)
}

// path is one of them.
func (p *patient) path(t *testing.T) string {
	t.Helper()
	paths := p.paths(t)
	if len(paths) == 0 {
		t.Fatalf("image %s has no copy", p.name)
	}
	return paths[0]
}

// on is its copy on a node.
func (p *patient) on(t *testing.T, node int) string {
	t.Helper()
	for _, path := range p.paths(t) {
		if strings.HasPrefix(path, p.i.disk(node)+"/") {
			return path
		}
	}
	t.Fatalf("image %s has no copy on node-%d", p.name, node)
	return ""
}

// status is all that the image says of itself.
func (p *patient) status() string {
	object, _, err := tryGet[map[string]any](p.i, "backingimage", p.name)
	if err != nil {
		return err.Error()
	}
	return statusOf(object)
}

// statusOf is the status of an object as text.
func statusOf(object map[string]any) string {
	text, _ := json.Marshal(object["status"])
	return strings.NewReplacer(`\u003c`, "<", `\u003e`, ">", `\"`, `"`).Replace(string(text))
}

// fallsIll makes the image, does the harm and looks for its name.
func (f fault) fallsIll(t *testing.T, p *patient) {
	if f.begin != nil {
		p.i.apply(t, f.begin(p))
	} else {
		p.i.apply(t, p.yaml())
		p.untilWell(t)
	}
	p.undo = func() {}
	if f.passing {
		stop := f.watch(t, p)
		p.undo = f.inject(t, p)
		stop()
		return
	}
	if f.inject != nil {
		p.undo = f.inject(t, p)
	}
	eventually(t, namedWithin, "the status says "+fmt.Sprint(f.says), func() (bool, string) {
		status := p.status()
		return says(status, f.says), status
	})
	why := f.why
	if why == nil {
		why = f.says
	}
	eventually(t, namedWithin, "why says "+fmt.Sprint(why), func() (bool, string) {
		text := p.i.why("backingimage", p.name)
		return says(text, why), text
	})
}

// watch looks for what is said for a moment only; stop waits until it was seen.
func (f fault) watch(t *testing.T, p *patient) (stop func()) {
	seen := make(chan struct{})
	found := sync.OnceFunc(func() { close(seen) })
	end := eachVersion(t, p.i, "backingimage", p.name, func(o map[string]any) {
		if says(statusOf(o), f.says) {
			found()
		}
	})
	return func() {
		t.Helper()
		defer end()
		select {
		case <-seen:
		case <-time.After(namedWithin):
			t.Errorf("the status never said %v: %s", f.says, p.status())
		}
	}
}

// untilWell waits until every copy that is wanted is ready and is the image.
func (p *patient) untilWell(t *testing.T) {
	t.Helper()
	until(t, p.i, healedWithin, "backingimage", p.name, "has all its copies", func(o imageObject) bool {
		return conditionOf(o.Status.Conditions, "Ready").Status == "True" && len(readyCopies(o)) >= p.copies && len(readyCopies(o)) == len(o.Status.DiskFileStatusMap)
	})
	for _, path := range p.paths(t) {
		if got := checksumOf(t, path); got != p.image.checksum {
			t.Errorf("%s: SHA-512 %s, want %s", path, got[:16], p.image.checksum[:16])
		}
	}
}

// Each fault names itself in the status and in `why` within ten seconds, nothing waits without a reason meanwhile, and it ends by
// itself when the fault is taken away. Those that touch one image only happen all at once, those of disks and processes one by one.
func TestEveryFaultNamesItselfAndEnds(t *testing.T) {
	i := ownInstance(t, 3)
	image := ext4Image(t, 16)
	good := serve(t, image.path) + "/" + filepath.Base(image.path)
	watchReasons(t, i)
	ofImages := append(sourceFaults(t, image), fileFaults()...)
	ofImages = append(ofImages, wishFaults()...)
	patients := make([]*patient, len(ofImages))
	t.Run("images", func(t *testing.T) {
		all := func(what string, do func(t *testing.T, n int)) {
			t.Run(what, func(t *testing.T) {
				for n, f := range ofImages {
					t.Run(f.name, func(t *testing.T) {
						t.Parallel()
						do(t, n)
					})
				}
			})
		}
		all("named", func(t *testing.T, n int) {
			f := ofImages[n]
			name := "fault-" + strings.NewReplacer(" ", "-", ",", "").Replace(f.name)
			patients[n] = &patient{i: i, name: name, image: image, url: good, copies: f.copies}
			f.fallsIll(t, patients[n])
		})
		// What was lost as a whole is downloaded again after this.
		setting(t, i, "backing-image-recovery-wait-interval", "1")
		all("ended", func(t *testing.T, n int) {
			if p := patients[n]; p != nil && p.undo != nil {
				p.undo()
				p.i.apply(t, p.yaml())
				p.untilWell(t)
				noTemporaryFilesAfterDeletion(t, i, p.name)
			}
		})
		setting(t, i, "backing-image-recovery-wait-interval", "300")
	})
	for _, f := range append(diskFaults(t), processFaults(t)...) {
		t.Run(f.name, func(t *testing.T) {
			p := &patient{i: i, name: "fault-of-a-machine", image: image, url: good, copies: f.copies}
			restore := sync.OnceFunc(func() {
				if p.undo != nil {
					p.undo()
				}
			})
			t.Cleanup(func() {
				restore()
				i.run("", "delete", "backingimage", p.name)
				untilGone(t, i, 30*time.Second, "backingimage", p.name)
			})
			f.fallsIll(t, p)
			restore()
			p.untilWell(t)
			noTemporaryFiles(t, i, p.name)
		})
	}
	for _, kind := range []string{"backingimage", "backingimagedatasource", "backingimagemanager"} {
		eventually(t, 30*time.Second, "no "+kind+" is left", func() (bool, string) {
			left, err := tryList[object](i, kind)
			return err == nil && len(left) == 0, fmt.Sprint(left, err)
		})
	}
}

// setting changes a global value.
func setting(t *testing.T, i *instance, name, value string) {
	t.Helper()
	i.apply(t, fmt.Sprintf("apiVersion: longhorn.io/v1beta2\nkind: Setting\nmetadata:\n  name: %s\n  namespace: longhorn-system\nvalue: \"%s\"\n", name, value))
}

// rename moves a file or directory away until it is undone.
func rename(t *testing.T, path string) (undo func()) {
	t.Helper()
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Rename(path+".away", path); err != nil {
			t.Error(err)
		}
	}
}

// rewrite gives a file another content until it is undone.
func rewrite(t *testing.T, path, content string) (undo func()) {
	t.Helper()
	before, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, []byte(content), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.WriteFile(path, before, 0o644); err != nil {
			t.Error(err)
		}
	}
}
