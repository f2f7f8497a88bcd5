package sanitytests

import (
	"errors"
	"fmt"
	"os"
	"strings"
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
