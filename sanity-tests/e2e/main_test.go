// Package e2e runs the driver as its users do: on a Kubernetes with two nodes (sanity-tests/cluster), installed from deploy/manifests,
// with the official sidecars and real pods.
//
// One cluster serves all flows; each leaves nothing of its own, and the last one uninstalls the driver. The cluster goes down also
// after a failure; KEEP=1 leaves it for whoever wants to look. What an earlier run left is removed first.
package e2e

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"
)

// c is the cluster of all tests.
var c *cluster

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (code int) {
	times.begin("prepare")
	made, err := newCluster()
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		return 1
	}
	c = made
	// Also when somebody presses ^C, or CI's patience ends.
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-stop
		c.down()
		os.Exit(1)
	}()
	defer func() {
		times.begin("down")
		c.down()
		times.print()
	}()
	if err := c.up(); err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		c.explain(os.Stderr)
		return 1
	}
	times.begin("flows")
	return m.Run()
}

// times says where the time went: phases, and below them the flows.
var times timetable

type timetable struct {
	rows  []string
	name  string
	since time.Time
}

func (t *timetable) begin(name string) {
	t.end()
	t.name, t.since = name, time.Now()
	fmt.Println("==", name)
}

func (t *timetable) end() {
	if t.name != "" {
		t.rows = append(t.rows, row(t.name, time.Since(t.since)))
		t.name = ""
	}
}

func (t *timetable) print() {
	t.end()
	fmt.Printf("== where the time went\n%s\n", strings.Join(t.rows, "\n"))
}

func row(name string, took time.Duration) string {
	return fmt.Sprintf("%8.1f s  %s", took.Seconds(), name)
}

// flow begins a test on nodes with the tags of the documents; when it ends, nothing of it may be left.
func flow(t *testing.T) {
	t.Helper()
	timed(t)
	t.Cleanup(func() { nothingLeft(t) })
	tagged(t)
}

// timed notes a test's time; one that failed says what stands in the cluster.
func timed(t *testing.T) {
	t.Helper()
	began := time.Now()
	t.Cleanup(func() {
		times.rows = append(times.rows, row("  "+t.Name(), time.Since(began)))
		if t.Failed() {
			c.explain(os.Stdout)
		}
	})
}
