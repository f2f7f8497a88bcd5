// Package sanitytests runs csi-sanity and user flows against the real binary in standalone mode.
//
// One instance with three nodes of one disk serves every test that does not stop it; faults that end the instance get one of their own.
package sanitytests

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

// long asks for the long form of tests that search at random.
var long = flag.Bool("long", false, "run tests that search at random for hours instead of seconds")

// shared starts the instance that tests use unless they end it, when the first of them asks for it.
var shared = sync.OnceValues(func() (*instance, error) { return startInstance(3) })

// sharedUsed says whether there is something to end.
var sharedUsed atomic.Bool

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	code = m.Run()
	if !sharedUsed.Load() {
		return code
	}
	i, err := shared()
	if err != nil {
		return 1
	}
	if err := i.end(); err != nil {
		fmt.Fprintf(os.Stderr, "FAIL: %v\n", err)
		code = 1
	}
	if code == 0 {
		os.RemoveAll(i.root)
	} else {
		fmt.Fprintf(os.Stderr, "data and logs are kept in %s\n", i.root)
	}
	return code
}

// programUnderTest is the path of the binary.
func programUnderTest() (string, error) {
	path := os.Getenv("BACKING_IMAGE_CSI_BINARY")
	if path == "" {
		path = "../target/release/backing-image-csi"
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w; build it (cargo build --release) or set BACKING_IMAGE_CSI_BINARY", err)
	}
	return path, nil
}
