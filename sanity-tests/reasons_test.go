package sanitytests

import (
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// waiting is what every object has that can wait for something.
type waiting struct {
	object
	Spec struct {
		DesireState string `json:"desireState"`
		NodeID      string `json:"nodeID"`
		FailedAt    string `json:"failedAt"`
	} `json:"spec"`
	Status struct {
		State        string      `json:"state"`
		Robustness   string      `json:"robustness"`
		CurrentState string      `json:"currentState"`
		Conditions   []condition `json:"conditions"`
	} `json:"status"`
}

// replicaNames finds the names of replicas in a sentence.
var replicaNames = regexp.MustCompile(`\S+-r-[0-9a-f]{8}`)

const (
	// reasonWithin is how long something may be new before it says what it waits for.
	reasonWithin = 2 * time.Second
	sampleEvery  = 400 * time.Millisecond
)

// watchReasons looks at everything that waits, until stopped or the end of the test: each has a reason in a condition, and `why` tells it.
func watchReasons(t *testing.T, i *instance) (stop func()) {
	t.Helper()
	end, ended := make(chan struct{}), make(chan struct{})
	since, told := map[string]time.Time{}, map[string]waiting{}
	go func() {
		defer close(ended)
		tick := time.NewTicker(sampleEvery)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			silent := withoutReason(i, told)
			if silent == nil {
				// Nobody answers while the instance is dead.
				clear(since)
				continue
			}
			for key := range since {
				if silent[key] == "" {
					delete(since, key)
				}
			}
			for key, what := range silent {
				if since[key].IsZero() {
					since[key] = time.Now()
				} else if time.Since(since[key]) > reasonWithin {
					t.Errorf("%s waits without a reason for %s: %s", key, time.Since(since[key]), what)
					since[key] = time.Now().Add(time.Hour)
				}
			}
		}
	}()
	stop = sync.OnceFunc(func() {
		close(end)
		<-ended
	})
	t.Cleanup(stop)
	return stop
}

// everythingSaysWhy fails the test unless everything that waits now gives its reason soon.
func everythingSaysWhy(t *testing.T, i *instance) {
	t.Helper()
	eventually(t, reasonWithin, "everything says what it waits for", func() (bool, string) {
		silent := withoutReason(i, nil)
		return len(silent) == 0, fmt.Sprint(silent)
	})
}

// withoutReason is what waits now without saying why; nil when nobody can be asked. What is told is not asked for again until it changes.
func withoutReason(i *instance, told map[string]waiting) map[string]string {
	silent := map[string]string{}
	for _, kind := range []string{"backingimage", "volume", "replica", "engine", "backingimagemanager", "backingimagedatasource"} {
		objects, err := tryList[waiting](i, kind)
		if err != nil {
			return nil
		}
		for _, o := range objects {
			key := kind + " " + o.Metadata.Name
			if reflect.DeepEqual(told[key], o) {
				continue
			}
			if what := silence(i, kind, o); what != "" {
				silent[key] = what
				continue
			}
			if told != nil {
				told[key] = o
			}
		}
	}
	return silent
}

// silence says what is missing in the reasons of one object; nothing when it waits for nothing.
func silence(i *instance, kind string, o waiting) string {
	about := []string{"Ready"}
	switch kind {
	case "backingimage", "backingimagemanager", "backingimagedatasource":
		if conditionOf(o.Status.Conditions, "Ready").Status == "True" {
			return ""
		}
	case "volume":
		isWell := o.Status.State == "detached" && o.Spec.NodeID == "" || o.Status.State == "attached" && o.Status.Robustness == "healthy"
		if isWell || o.Metadata.DeletionTimestamp != "" {
			return ""
		}
		if o.Status.State == "detaching" {
			about = []string{"Detached", "Ready"}
		}
	case "replica", "engine":
		if o.Spec.DesireState != "running" || o.Status.CurrentState == "running" || o.Spec.FailedAt != "" || o.Metadata.DeletionTimestamp != "" {
			return ""
		}
	}
	seen := fmt.Sprintf("%+v", o.Status)
	var reason condition
	for _, name := range about {
		c := conditionOf(o.Status.Conditions, name)
		if reason.Message == "" && c.Reason != "" && !strings.HasSuffix(strings.TrimSpace(c.Message), ":") {
			reason = c
		}
	}
	if reason.Message == "" {
		return "no condition has a reason and a message: " + seen
	}
	told := []string{reason.Message[1:]}
	if _, copied, found := strings.Cut(reason.Message, " %: "); kind == "replica" && found && reason.Reason == "WaitForBackingImage" {
		// The copy says it itself.
		told = []string{"the copy of image", copied[1:]}
	}
	if reason.Status == "True" {
		// A volume that is degraded, and works: why tells it replica by replica.
		told = append(replicaNames.FindAllString(reason.Message, -1), "degraded")
	}
	if why := i.why(kind, o.Metadata.Name); !says(why, told) {
		if now, _, err := tryGet[waiting](i, kind, o.Metadata.Name); err == nil && reflect.DeepEqual(now, o) {
			return fmt.Sprintf("its condition says `%s`, but why says: %s", reason.Message, why)
		}
	}
	return ""
}
