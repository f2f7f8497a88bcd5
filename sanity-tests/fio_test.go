package sanitytests

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// fio is one run of fio, which ends with an error when a request fails or a block that it reads is not what it wrote.
type fio struct {
	args   []string
	output bytes.Buffer
	done   chan error
}

// fioSize is how much of a file or device a run uses.
const fioSize = 24 * mib

// fioArguments are a workload of random writes of random sizes at depth 16 that is the same for the same seed.
func fioArguments(path string, offset, seed int64) []string {
	return []string{
		"--name=round", "--filename=" + path, fmt.Sprintf("--offset=%d", offset), fmt.Sprintf("--size=%d", fioSize),
		"--ioengine=libaio", "--direct=1", "--iodepth=16", "--bsrange=4k-64k", "--blockalign=4k", fmt.Sprintf("--randseed=%d", seed),
		"--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
	}
}

// startFio starts a run.
func startFio(t *testing.T, args []string) *fio {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*answeredWithin)
	f := &fio{args: args, done: make(chan error, 1)}
	command := exec.CommandContext(ctx, "fio", args...)
	command.Stdout, command.Stderr = &f.output, &f.output
	command.Dir = t.TempDir()
	// One that waits for a device in vain cannot even be killed.
	command.WaitDelay = time.Second
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		f.done <- command.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Error("fio does not end when it is killed: its requests are not answered")
		}
	})
	return f
}

// finish waits for the end of a run, which must be without any error.
func (f *fio) finish(t *testing.T) {
	t.Helper()
	if err := <-f.done; err != nil {
		t.Fatalf("fio %s: %v\n%s", strings.Join(f.args, " "), err, f.output.String())
	}
}
