// Package sanitytests runs csi-sanity and user flows against the real binary in standalone mode.
//
// One instance with three nodes of one disk serves every test that does not stop it; faults that end the instance get one of their own.
package sanitytests

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// shared is the instance that tests use unless they end it.
var shared *instance

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	var err error
	if shared, err = startInstance(3); err != nil {
		fmt.Fprintf(os.Stderr, "cannot start the instance: %v\n", err)
		return 1
	}
	defer func() {
		if err := shared.end(); err != nil {
			fmt.Fprintf(os.Stderr, "FAIL: %v\n", err)
			code = 1
		}
		if code == 0 {
			os.RemoveAll(shared.root)
		} else {
			fmt.Fprintf(os.Stderr, "data and logs are kept in %s\n", shared.root)
		}
	}()
	return m.Run()
}

// binary is the program under test.
func binary() (string, error) {
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
