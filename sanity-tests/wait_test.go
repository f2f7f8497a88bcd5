package sanitytests

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

const probeEvery = 50 * time.Millisecond

// waitFor probes until it is done, the deadline passes or ended closes; then failed says what the last probe saw.
func waitFor(within time.Duration, ended <-chan struct{}, probe func() (bool, string), failed func(last string) error) error {
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for {
		done, last := probe()
		if done {
			return nil
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			return failed(fmt.Sprintf("not within %s: %s", within, last))
		case <-ended:
			if done, _ := probe(); done {
				return nil
			}
			return failed("the process ended: " + last)
		}
	}
}

// eventually fails the test unless the probe is done in time.
func eventually(t testing.TB, within time.Duration, what string, probe func() (done bool, state string)) {
	t.Helper()
	if err := waitFor(within, nil, probe, func(last string) error { return errors.New(last) }); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// eachVersion looks at every stored version of an object, from the present one on, until stopped or the end of the test.
// A watch that ends before that fails the test: what nobody saw was not looked at.
func eachVersion[T any](t *testing.T, i *instance, kind, name string, look func(T)) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, i.collection(kind)+"?watch=true&fieldSelector=metadata.name%3D"+name, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		lines := bufio.NewScanner(response.Body)
		lines.Buffer(nil, 4*mib)
		for lines.Scan() {
			var event struct {
				Type   string
				Object T
			}
			err := json.Unmarshal(lines.Bytes(), &event)
			if err != nil || event.Type != "ADDED" && event.Type != "MODIFIED" && event.Type != "DELETED" {
				t.Errorf("watch %s %s: not every version was seen: %v %s", kind, name, err, lines.Text())
				return
			}
			if event.Type != "DELETED" {
				look(event.Object)
			}
		}
		if ctx.Err() == nil {
			t.Errorf("the watch ended: %s %s: what came after is not known: %v", kind, name, lines.Err())
		}
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		response.Body.Close()
		<-ended
	})
	t.Cleanup(stop)
	return stop
}

// tail is the end of a file.
func tail(path string, lines int) string {
	content, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(content), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// mentions fails the test unless a text contains all parts, whatever their case.
func mentions(t testing.TB, what, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(strings.ToLower(text), strings.ToLower(part)) {
			t.Errorf("%s does not mention `%s`:\n%s", what, part, text)
		}
	}
}
