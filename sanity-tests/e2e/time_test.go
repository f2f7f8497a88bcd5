// How long a user waits for a pod: with a volume from an image that is ready, with one that must be downloaded first, and without any.
package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"
)

const timedRounds = 3

// What is measured ends with the pod ready, and begins with the claim (or the pod, which has none). Figures of one run are to be
// compared with each other only.
func TestTimeFromTheClaimToTheRunningPod(t *testing.T) {
	flow(t)
	ready := newImage(t, 64)
	ready.copies = 2
	apply(t, ready.manifest("timed"))
	waitImageReady(t, "timed")
	apply(t, ready.class("timed", "timed", 2))
	took := map[string][]time.Duration{}
	measure := func(what string, objects ...string) {
		t.Run(strings.ReplaceAll(what, " ", "-"), func(t *testing.T) {
			began := time.Now()
			for _, one := range objects {
				apply(t, one)
			}
			waitRunning(t, "timed")
			took[what] = append(took[what], time.Since(began))
			if len(objects) > 1 {
				hasImage(t, "timed")
			}
		})
	}
	const without, withImage, withDownload = "emptyDir", "image that is ready", "image to be downloaded"
	for round := range timedRounds {
		measure(without, emptyPod(t))
		measure(withImage, claimOf("timed", "timed", "Filesystem", "ReadWriteOnce", 96), podOf("timed", "timed", "", false))
		name := fmt.Sprintf("fresh-%d", round)
		fresh := newImage(t, 64)
		fresh.copies = 2
		apply(t, fresh.class(name, name, 2))
		t.Cleanup(func() { remove(t, object("longhorn.io/v1beta2", "BackingImage", system, name)) })
		measure(withDownload, claimOf("timed", name, "Filesystem", "ReadWriteOnce", 96), podOf("timed", "timed", "", false))
	}
	base := median(took[without])
	for _, what := range []string{without, withImage, withDownload} {
		all, middle := took[what], median(took[what])
		if len(all) != timedRounds {
			t.Fatalf("%s: %d of %d rounds were measured", what, len(all), timedRounds)
		}
		fmt.Printf("time: %-24s %5.1f s (%.1f times emptyDir; worst %.1f s)\n", what, middle.Seconds(),
			middle.Seconds()/base.Seconds(), slices.Max(all).Seconds())
	}
	writeFigures(t, took)
}

// writeFigures gives all rounds to whoever measures (cargo xtask bench kubernetes), in the file that FIGURES names.
func writeFigures(t *testing.T, took map[string][]time.Duration) {
	t.Helper()
	path := os.Getenv("FIGURES")
	if path == "" {
		return
	}
	seconds := map[string][]float64{}
	for what, all := range took {
		for _, one := range all {
			seconds[what] = append(seconds[what], one.Seconds())
		}
	}
	text, err := json.Marshal(seconds)
	must(t, err)
	must(t, os.WriteFile(path, text, 0o600))
}

func median(all []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(all))
	if len(sorted) == 0 {
		return 0
	}
	return sorted[len(sorted)/2]
}

// emptyPod is the same pod with a directory of its node.
func emptyPod(t *testing.T) string {
	t.Helper()
	var pod map[string]any
	must(t, yaml.Unmarshal([]byte(podOf("timed", "none", "", false)), &pod))
	volume := pod["spec"].(map[string]any)["volumes"].([]any)[0].(map[string]any)
	delete(volume, "persistentVolumeClaim")
	volume["emptyDir"] = map[string]any{}
	text, err := yaml.Marshal(pod)
	must(t, err)
	return string(text)
}
