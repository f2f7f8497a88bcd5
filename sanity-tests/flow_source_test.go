package sanitytests

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Addresses that are none are refused in Longhorn's words, when an image is made and when it is changed, and change nothing.
func TestWrongAddressesAreRefusedInLonghornsWords(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	good := serve(t, image.path) + "/" + filepath.Base(image.path)
	i.apply(t, imageYAML("addressed", good, image.checksum, 1))
	removeImage(t, i, "addressed")
	before := untilImageReady(t, i, "addressed")
	for url, words := range map[string]string{
		"":                      "download URL is not provided",
		"no-address":            "invalid URI for request",
		"ftp://example.com/x":   "invalid download URL scheme",
		"file:///etc/passwd":    "invalid download URL scheme",
		"https://example .com/": "invalid URI for request",
	} {
		_, stderr, code := i.run("", "image", "create", "wrong-address", "--url", url)
		if code != 2 {
			t.Errorf("create `%s`: exit code %d", url, code)
		}
		mentions(t, "create `"+url+"`", stderr, words)
		code, answer := put(t, i, "backingimage", "addressed", func(o map[string]any) {
			spec(o)["sourceParameters"] = map[string]any{"url": url}
		})
		if code < 400 || code >= 500 {
			t.Errorf("update `%s`: %d", url, code)
		}
		mentions(t, "update `"+url+"`", answer, words)
	}
	if _, notFound, err := tryGet[imageObject](i, "backingimage", "wrong-address"); err != nil || !notFound {
		t.Errorf("an image came to be (%v)", err)
	}
	after := get[imageObject](t, i, "backingimage", "addressed")
	if after.Spec.SourceParameters["url"] != good || len(readyCopies(after)) != len(readyCopies(before)) {
		t.Errorf("a change that was refused was made: %+v", after)
	}
}

// A node that comes, and one that is changed, does not disturb a download that runs: the same process goes on, and asks nothing anew.
func TestAnotherNodeDoesNotDisturbADownload(t *testing.T) {
	i := ownInstance(t, 2)
	image := ext4Image(t, 16)
	url, half, release := heldServer(t, image.path)
	i.apply(t, imageYAML("undisturbed", url, image.checksum, 1))
	removeImage(t, i, "undisturbed")
	select {
	case <-half:
	case <-time.After(readyWithin):
		t.Fatalf("the download did not begin: %s", i.why("backingimage", "undisturbed"))
	}
	before := dataSources(i, "undisturbed")
	if len(before) != 1 {
		t.Fatalf("want one data source: %v", before)
	}
	disk := func() []string {
		return slices.Collect(func(yield func(string) bool) {
			for disk := range get[imageObject](t, i, "backingimage", "undisturbed").Status.DiskFileStatusMap {
				yield(disk)
			}
		})
	}
	at := disk()
	i.apply(t, strings.Replace(nodeHead(9), "spec:\n", "spec:\n  allowScheduling: true\n", 1)+fmt.Sprintf("  disks:\n    disk-1:\n      path: %s\n      allowScheduling: true\n", i.path("nodes", "node-9", "disk-1")))
	t.Cleanup(func() { i.run("", "delete", "node", "node-9") })
	for _, node := range []string{"node-1", "node-2"} {
		mustPut(t, i, "node", node, func(o map[string]any) { spec(o)["tags"] = append(spec(o)["tags"].([]any), "another") })
	}
	// Whoever looks at images has seen the change once an image that wants the tag is placed.
	i.apply(t, imageYAML("tag-is-seen", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 1)+"  nodeSelector: [another]\n")
	removeImage(t, i, "tag-is-seen")
	untilImageReady(t, i, "tag-is-seen")
	if now := dataSources(i, "undisturbed"); len(now) != 1 || now[0].pid != before[0].pid {
		t.Errorf("the data source was started anew: %v, then %v", before, now)
	}
	if now := disk(); !slices.Equal(at, now) {
		t.Errorf("the download moved from disk %v to %v", at, now)
	}
	release()
	object := untilImageReady(t, i, "undisturbed")
	if object.Status.Checksum != image.checksum {
		t.Errorf("SHA-512 %s", object.Status.Checksum)
	}
}

// A proxy of the environment is asked for images from outside, and for nothing else: what our own processes say to each other goes straight.
func TestAProxyOfTheEnvironmentIsForSourcesOnly(t *testing.T) {
	image := ext4Image(t, 16)
	var mutex sync.Mutex
	asked := map[string]int{}
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mutex.Lock()
		asked[r.Host]++
		mutex.Unlock()
		if r.Host != "images.example" {
			http.Error(w, "nobody outside has that", http.StatusBadGateway)
			return
		}
		file, err := os.Open(image.path)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer file.Close()
		w.Header().Set("Content-Length", fmt.Sprint(16*mib))
		io.Copy(w, file)
	}))
	t.Cleanup(proxy.Close)
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"} {
		t.Setenv(name, proxy.URL)
	}
	i := ownInstance(t, 2)
	i.apply(t, imageYAML("proxied", "http://images.example/image.raw", image.checksum, 2))
	removeImage(t, i, "proxied")
	for _, path := range copyPaths(i, "proxied", untilCopies(t, i, "proxied", 2).Status.UUID) {
		if got := checksumOf(t, path); got != image.checksum {
			t.Errorf("%s: SHA-512 %s", path, got)
		}
	}
	i.cli(t, "image", "verify", "proxied", "--timeout", "30s")
	mutex.Lock()
	defer mutex.Unlock()
	if len(asked) != 1 || asked["images.example"] == 0 {
		t.Errorf("the proxy was asked for %v", asked)
	}
}
