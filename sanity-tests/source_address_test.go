package sanitytests

import (
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"
)

const allowedSources = "backing-image-allowed-source-addresses"

// What a setting says of addresses counts when an image is written and when it is fetched, from the moment on that it is changed.
func TestSourceAddressIsAllowedByASetting(t *testing.T) {
	t.Parallel()
	i := ownInstance(t, 1)
	image := ext4Image(t, 16)
	listener, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	neighbor := &httptest.Server{Listener: listener, Config: &http.Server{Handler: http.FileServer(http.Dir(filepath.Dir(image.path)))}}
	neighbor.Start()
	t.Cleanup(neighbor.Close)
	there := neighbor.URL + "/" + filepath.Base(image.path)
	door, _ := sourceServer(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, there, http.StatusFound) })

	setting(t, i, allowedSources, "127.0.0.1")
	_, stderr, code := i.run("", "image", "create", "direct", "--url", there, "--min-copies", "1")
	if code != 2 {
		t.Errorf("exit code %d, want 2", code)
	}
	mentions(t, "image create", stderr, "must not target a loopback address", allowedSources)
	_, stderr, code = i.run("", "image", "create", "redirected", "--url", door+"/x.raw", "--min-copies", "1", "--wait", "--timeout", "20s")
	if code != 2 {
		t.Errorf("exit code %d, want 2", code)
	}
	mentions(t, "image create --wait", stderr, "127.0.0.2", "is a loopback address", allowedSources)
	mentions(t, "why", i.why("image", "redirected"), "127.0.0.2", allowedSources)

	// The next attempt is minutes away, but a setting is a new wish.
	setting(t, i, allowedSources, "127.0.0.0/8")
	eventually(t, 30*time.Second, "the image is ready", func() (bool, string) {
		_, stderr, code := i.run("", "image", "wait", "redirected", "--timeout", "1s")
		return code == 0, stderr
	})
	i.cli(t, "image", "create", "direct", "--url", there, "--min-copies", "1", "--wait", "--timeout", "20s")
	_, stderr, code = i.run("apiVersion: longhorn.io/v1beta2\nkind: Setting\nmetadata:\n  name: "+allowedSources+"\n  namespace: longhorn-system\nvalue: localhost\n", "apply", "-f", "-")
	if code != 2 {
		t.Errorf("exit code %d, want 2", code)
	}
	mentions(t, "apply", stderr, "addresses and networks like 127.0.0.1, 127.0.0.0/8 or ::1")
}
