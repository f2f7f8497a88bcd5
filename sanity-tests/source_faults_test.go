package sanitytests

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// counting is a server that counts the bytes of bodies that it sends.
type counting struct {
	http.ResponseWriter
	sent *atomic.Int64
}

func (c counting) Write(bytes []byte) (int, error) {
	n, err := c.ResponseWriter.Write(bytes)
	c.sent.Add(int64(n))
	return n, err
}

// sourceServer serves whatever a handler does; paths are its own affair.
func sourceServer(t *testing.T, handler func(w http.ResponseWriter, r *http.Request)) (url string, sent *atomic.Int64) {
	t.Helper()
	sent = new(atomic.Int64)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handler(counting{w, sent}, r)
	}))
	t.Cleanup(server.Close)
	// What is still being sent must not hold the server.
	t.Cleanup(server.CloseClientConnections)
	return server.URL, sent
}

// rawServer answers every request with these bytes and closes the connection.
func rawServer(t *testing.T, answer []byte) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				conn.Read(make([]byte, 4096))
				conn.Write(answer)
			}()
		}
	}()
	return "http://" + listener.Addr().String()
}

// changed writes a copy of a file with some bytes changed.
func changed(t *testing.T, path string, at int64, bytes ...byte) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	copy(content[at:], bytes)
	other := filepath.Join(t.TempDir(), fmt.Sprintf("changed-%d-%s", at, filepath.Base(path)))
	if err := os.WriteFile(other, content, 0o644); err != nil {
		t.Fatal(err)
	}
	return other
}

// A failure that no repetition cures ends `image create --wait` at once, with the reason and the exit code of its kind.
func TestWaitingEndsWhenTheFailureIsFinal(t *testing.T) {
	t.Parallel()
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain.qcow2")
	must(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", image.path, plain)
	huge := filepath.Join(dir, "huge.qcow2")
	must(t, "qemu-img", "create", "-q", "-f", "qcow2", huge, "17T")
	// The refcount table where the L1 table is, an L1 table of 32 GiB, an extension that is longer than the header.
	content, _ := os.ReadFile(plain)
	overlapping := changed(t, plain, 48, content[40:48]...)
	absurd := changed(t, plain, 36, 0xff, 0xff, 0xff, 0xff)
	lying := changed(t, plain, 112, 0x68, 0x03, 0xf8, 0x57, 0x7f, 0, 0, 0)
	unknown := changed(t, plain, 72, 0x80)
	files := serve(t, image.path, huge, overlapping, absurd, lying, unknown)
	head := "HTTP/1.1 200 OK\r\nConnection: close\r\n"
	body, _ := os.ReadFile(image.path)
	endless, _ := sourceServer(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/again", http.StatusFound) })

	cases := []struct {
		name, url, checksum string
		code                int
		mentions            []string
	}{
		{"final-scheme", "ftp://127.0.0.1/x.raw", "", 2, []string{"ftp", "http"}},
		{"final-404", files + "/missing.raw", "", 3, []string{"answered 404"}},
		{"final-checksum", files + "/" + filepath.Base(image.path), strings.Repeat("ab", 64), 8, []string{"SHA-512", "was expected"}},
		{"final-redirects", endless + "/x.raw", "", 2, []string{"more than 10 redirects"}},
		{"final-no-length", rawServer(t, append([]byte(head+"\r\n"), body...)) + "/x.raw", "", 2, []string{"without saying how many", "checksum"}},
		{"final-inflated", rawServer(t, append([]byte(head+"Content-Encoding: gzip\r\nContent-Length: 512\r\n\r\n"), body[:512]...)) + "/x.raw", "", 2, []string{"compresses the transfer"}},
		{"final-huge", files + "/huge.qcow2", "", 2, []string{"virtual size", "above the limit"}},
		{"final-overlap", files + "/" + filepath.Base(overlapping), "", 2, []string{"the L1 table and the refcount table overlap"}},
		{"final-absurd", files + "/" + filepath.Base(absurd), "", 2, []string{"L1 table claims"}},
		{"final-lying", files + "/" + filepath.Base(lying), "", 2, []string{"longer than the header"}},
		{"final-unknown", files + "/" + filepath.Base(unknown), "", 2, []string{"incompatible feature bits"}},
	}
	t.Run("all", func(t *testing.T) {
		for _, c := range cases {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				removeImage(t, i, c.name)
				_, stderr, code := i.run("", "image", "create", c.name, "--url", c.url, "--checksum", c.checksum, "--min-copies", "1", "--wait", "--timeout", "20s")
				if code != c.code {
					t.Errorf("exit code %d, want %d: %s", code, c.code, stderr)
				}
				mentions(t, "image create --wait", stderr, c.mentions...)
				if c.name == "final-scheme" {
					// It was refused before there was anything.
					return
				}
				mentions(t, "image create --wait", stderr, "cannot become ready", "you can: correct")
				mentions(t, "why", i.why("backingimage", c.name), append(c.mentions, "next attempt")...)
				noTemporaryFiles(t, i, c.name)
			})
		}
	})
	t.Run("a corrected address is waited for", func(t *testing.T) {
		i.apply(t, imageYAML("final-corrected", files+"/missing.raw", image.checksum, 1))
		removeImage(t, i, "final-corrected")
		if _, stderr, code := i.run("", "image", "wait", "final-corrected", "--timeout", "30s"); code != 3 {
			t.Errorf("exit code %d: %s", code, stderr)
		}
		i.apply(t, imageYAML("final-corrected", files+"/"+filepath.Base(image.path), image.checksum, 1))
		i.cli(t, "image", "wait", "final-corrected", "--timeout", "30s")
	})
}

// What may pass is tried again, and everybody can see why and when.
func TestWhatMayPassIsTriedAgain(t *testing.T) {
	t.Parallel()
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	content, err := os.ReadFile(image.path)
	if err != nil {
		t.Fatal(err)
	}
	broken, _ := sourceServer(t, func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusInternalServerError) })

	// Silent after its first MiB until somebody has seen that it is.
	seen := make(chan struct{})
	see := sync.OnceFunc(func() { close(seen) })
	t.Cleanup(see)
	var asked atomic.Int32
	silent, _ := sourceServer(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"v1"`)
		if asked.Add(1) == 1 {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			w.Write(content[:mib])
			w.(counting).ResponseWriter.(http.Flusher).Flush()
			<-r.Context().Done()
			return
		}
		select {
		case <-seen:
			http.ServeContent(w, r, "image.raw", time.Time{}, strings.NewReader(string(content)))
		case <-r.Context().Done():
		}
	})
	i.apply(t, imageYAML("retry-silent", silent+"/image.raw", image.checksum, 1))
	removeImage(t, i, "retry-silent")

	for _, c := range []struct {
		name, url string
		mentions  []string
	}{
		{"retry-500", broken + "/image.raw", []string{"answered 500"}},
		{"retry-dns", "http://no-such-host.invalid/image.raw", []string{"no-such-host.invalid", "cannot connect"}},
	} {
		i.apply(t, imageYAML(c.name, c.url, "", 1))
		removeImage(t, i, c.name)
		object := until(t, i, 30*time.Second, "backingimage", c.name, "says why it is not ready", func(o imageObject) bool {
			ready := conditionOf(o.Status.Conditions, "Ready")
			return says(ready.Message, c.mentions) && ready.NextRetryTime != ""
		})
		if ready := conditionOf(object.Status.Conditions, "Ready"); ready.Hint == "" || ready.Status != "False" {
			t.Errorf("%s: %+v", c.name, ready)
		}
		mentions(t, "why", i.why("backingimage", c.name), c.mentions...)
		_, stderr, code := i.run("", "image", "wait", c.name, "--timeout", "300ms")
		if code != 7 {
			t.Errorf("%s: exit code %d, want 7 (it goes on): %s", c.name, code, stderr)
		}
		mentions(t, "image wait", stderr, c.mentions...)
		noTemporaryFilesAfterDeletion(t, i, c.name)
	}

	until(t, i, 45*time.Second, "backingimage", "retry-silent", "says that the server is silent", func(o imageObject) bool {
		return says(conditionOf(o.Status.Conditions, "Ready").Message, []string{"silent for 30s"})
	})
	mentions(t, "why", i.why("backingimage", "retry-silent"), "silent for 30s")
	see()
	if o := untilImageReady(t, i, "retry-silent"); o.Status.Checksum != image.checksum {
		t.Errorf("checksum %s", o.Status.Checksum)
	}
	noTemporaryFiles(t, i, "retry-silent")
}

// noTemporaryFilesAfterDeletion deletes an image that is being prepared: what there was of it goes, too.
func noTemporaryFilesAfterDeletion(t *testing.T, i *instance, name string) {
	t.Helper()
	i.cli(t, "delete", "backingimage", name)
	untilGone(t, i, 20*time.Second, "backingimage", name)
	noTemporaryFiles(t, i, name)
	nothingLeftOf(t, i, name, "none-"+name)
}

// Servers with odd manners from which an image comes all the same, and what that costs.
func TestOddServersGiveTheImageAllTheSame(t *testing.T) {
	t.Parallel()
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	content, err := os.ReadFile(image.path)
	if err != nil {
		t.Fatal(err)
	}
	half := len(content) / 2
	cut := func(w http.ResponseWriter) {
		w.Header().Set("Content-Length", fmt.Sprint(len(content)))
		w.Write(content[:half])
		panic(http.ErrAbortHandler)
	}
	plain := filepath.Join(t.TempDir(), "turned.qcow2")
	must(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", image.path, plain)
	turned, err := os.ReadFile(plain)
	if err != nil {
		t.Fatal(err)
	}

	cases := []struct {
		name, checksum, format string
		size, most             int
		handler                func(number int, w http.ResponseWriter, r *http.Request)
	}{
		{"odd-head", "", "raw", len(content), len(content), func(_ int, w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead {
				http.Error(w, "no", http.StatusMethodNotAllowed)
				return
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			w.Write(content)
		}},
		{"odd-cut", "", "raw", len(content), len(content) + mib, func(number int, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"v1"`)
			if number == 1 {
				cut(w)
			}
			http.ServeContent(w, r, "image.raw", time.Time{}, strings.NewReader(string(content)))
		}},
		{"odd-cut-no-range", "", "raw", len(content), len(content) + half, func(number int, w http.ResponseWriter, r *http.Request) {
			if number == 1 {
				cut(w)
			}
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			w.Write(content)
		}},
		{"odd-turns-qcow2", "", "qcow2", len(turned), half + len(turned), func(number int, w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", fmt.Sprintf(`"v%d"`, number))
			if number == 1 {
				cut(w)
			}
			http.ServeContent(w, r, "image.raw", time.Time{}, strings.NewReader(string(turned)))
		}},
		{"odd-no-length", image.checksum, "raw", len(content), len(content), func(_ int, w http.ResponseWriter, r *http.Request) {
			conn, buffer, err := http.NewResponseController(w.(counting).ResponseWriter).Hijack()
			if err != nil {
				panic(err)
			}
			defer conn.Close()
			buffer.WriteString("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
			buffer.Write(content)
			buffer.Flush()
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int32
			url, sent := sourceServer(t, func(w http.ResponseWriter, r *http.Request) { c.handler(int(asked.Add(1)), w, r) })
			i.apply(t, imageYAML(c.name, url+"/image.raw", c.checksum, 1))
			removeImage(t, i, c.name)
			object := untilImageReady(t, i, c.name)
			if object.Status.Format != c.format || object.Status.Size != int64(c.size) {
				t.Errorf("format %s, %d bytes", object.Status.Format, object.Status.Size)
			}
			if n := int(sent.Load()); n > c.most {
				t.Errorf("%d bytes were fetched, want at most %d", n, c.most)
			}
			noTemporaryFiles(t, i, c.name)
		})
	}
	t.Run("odd-slow", func(t *testing.T) {
		t.Parallel()
		// It would take hours and always moves: nobody gives it up, and its progress shows.
		url, _ := sourceServer(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			ticks := time.NewTicker(10 * time.Millisecond)
			defer ticks.Stop()
			for at := 0; at+4096 <= len(content); at += 4096 {
				if _, err := w.Write(content[at : at+4096]); err != nil {
					return
				}
				w.(counting).ResponseWriter.(http.Flusher).Flush()
				select {
				case <-ticks.C:
				case <-r.Context().Done():
					return
				}
			}
		})
		i.apply(t, imageYAML("odd-slow", url+"/image.raw", "", 1))
		removeImage(t, i, "odd-slow")
		progress := func(o imageObject) (percent int) {
			for _, copy := range o.Status.DiskFileStatusMap {
				percent = copy.Progress
			}
			return percent
		}
		first := until(t, i, 30*time.Second, "backingimage", "odd-slow", "has begun", func(o imageObject) bool { return progress(o) > 0 })
		until(t, i, 30*time.Second, "backingimage", "odd-slow", "goes on", func(o imageObject) bool { return progress(o) > progress(first) })
		mentions(t, "why", i.why("backingimage", "odd-slow"), "%")
		noTemporaryFilesAfterDeletion(t, i, "odd-slow")
	})
}
