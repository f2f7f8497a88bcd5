package sanitytests

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type metadata struct {
	Name              string            `json:"name"`
	Namespace         string            `json:"namespace"`
	UID               string            `json:"uid"`
	Labels            map[string]string `json:"labels"`
	DeletionTimestamp string            `json:"deletionTimestamp"`
}

type condition struct {
	Type          string `json:"type"`
	Status        string `json:"status"`
	Reason        string `json:"reason"`
	Message       string `json:"message"`
	Hint          string `json:"hint"`
	NextRetryTime string `json:"nextRetryTime"`
}

// object is what every object has.
type object struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Metadata   metadata `json:"metadata"`
}

type imageObject struct {
	object
	Spec struct {
		Checksum          string            `json:"checksum"`
		SourceType        string            `json:"sourceType"`
		SourceParameters  map[string]string `json:"sourceParameters"`
		MinNumberOfCopies int               `json:"minNumberOfCopies"`
		DiskFileSpecMap   map[string]any    `json:"diskFileSpecMap"`
		NodeSelector      []string          `json:"nodeSelector"`
		DiskSelector      []string          `json:"diskSelector"`
	} `json:"spec"`
	Status struct {
		UUID              string                    `json:"uuid"`
		Size              int64                     `json:"size"`
		VirtualSize       int64                     `json:"virtualSize"`
		Checksum          string                    `json:"checksum"`
		Format            string                    `json:"format"`
		DiskFileStatusMap map[string]diskFileStatus `json:"diskFileStatusMap"`
		Conditions        []condition               `json:"conditions"`
	} `json:"status"`
}

type diskFileStatus struct {
	State      string `json:"state"`
	Progress   int    `json:"progress"`
	Message    string `json:"message"`
	ErrorKind  string `json:"errorKind"`
	VerifiedAt string `json:"verifiedAt"`
	Damage     string `json:"damage"`
}

type nodeObject struct {
	object
	Status struct {
		Conditions []condition           `json:"conditions"`
		DiskStatus map[string]diskStatus `json:"diskStatus"`
	} `json:"status"`
}

type diskStatus struct {
	DiskUUID   string      `json:"diskUUID"`
	Conditions []condition `json:"conditions"`
}

type volumeObject struct {
	object
	Spec struct {
		Size         string `json:"size"`
		NodeID       string `json:"nodeID"`
		BackingImage string `json:"backingImage"`
	} `json:"spec"`
	Status struct {
		State         string      `json:"state"`
		Robustness    string      `json:"robustness"`
		CurrentNodeID string      `json:"currentNodeID"`
		Conditions    []condition `json:"conditions"`
	} `json:"status"`
}

type replicaObject struct {
	object
	Spec struct {
		VolumeName        string `json:"volumeName"`
		NodeID            string `json:"nodeID"`
		FailedAt          string `json:"failedAt"`
		FailedReason      string `json:"failedReason"`
		DiskPath          string `json:"diskPath"`
		DataDirectoryName string `json:"dataDirectoryName"`
	} `json:"spec"`
	Status struct {
		CurrentState string `json:"currentState"`
		Generation   int    `json:"generation"`
	} `json:"status"`
}

// dir is the directory of its files.
func (r replicaObject) dir() string {
	return filepath.Join(r.Spec.DiskPath, "replicas", r.Spec.DataDirectoryName)
}

// replicaRecord is replica.json: what a replica itself knows of how current it is.
type replicaRecord struct {
	Generation int      `json:"generation"`
	Members    []string `json:"members"`
	Clean      bool     `json:"clean"`
}

func (r replicaObject) record(t testing.TB) (record replicaRecord) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(r.dir(), "replica.json"))
	if err == nil {
		err = json.Unmarshal(content, &record)
	}
	if err != nil {
		t.Fatal(err)
	}
	return record
}

type engineObject struct {
	object
	Spec struct {
		VolumeName string `json:"volumeName"`
	} `json:"spec"`
	Status struct {
		CurrentState   string            `json:"currentState"`
		Endpoint       string            `json:"endpoint"`
		Generation     int               `json:"generation"`
		ReplicaModeMap map[string]string `json:"replicaModeMap"`
		Version        string            `json:"version"`
		Conditions     []condition       `json:"conditions"`
	} `json:"status"`
}

type managerObject struct {
	object
	Spec struct {
		NodeID   string `json:"nodeID"`
		DiskUUID string `json:"diskUUID"`
		DiskPath string `json:"diskPath"`
	} `json:"spec"`
	Status struct {
		CurrentState string `json:"currentState"`
		IP           string `json:"ip"`
	} `json:"status"`
}

type claimObject struct {
	object
	Spec struct {
		VolumeName string `json:"volumeName"`
	} `json:"spec"`
	Status struct {
		Phase string `json:"phase"`
	} `json:"status"`
}

type persistentVolumeObject struct {
	object
	Spec struct {
		CSI struct {
			VolumeHandle string `json:"volumeHandle"`
		} `json:"csi"`
	} `json:"spec"`
}

// collection is the address of all objects of a kind.
func (i *instance) collection(kind string) string {
	path := "/apis/longhorn.io/v1beta2/namespaces/longhorn-system/" + kind + "s"
	switch kind {
	case "pvc":
		path = "/api/v1/namespaces/default/persistentvolumeclaims"
	case "pv":
		path = "/api/v1/persistentvolumes"
	case "storageclass":
		path = "/apis/storage.k8s.io/v1/storageclasses"
	case "volumeattachment":
		path = "/apis/storage.k8s.io/v1/volumeattachments"
	}
	return "http://" + i.listen + path
}

// read gets JSON from the instance; notFound is an outcome.
func read(address string, into any) (notFound bool, err error) {
	client := http.Client{Timeout: commandWithin}
	response, err := client.Get(address)
	if err != nil {
		return false, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return false, err
	}
	switch response.StatusCode {
	case http.StatusOK:
		return false, json.Unmarshal(body, into)
	case http.StatusNotFound:
		return true, nil
	}
	return false, fmt.Errorf("GET %s: %s: %s", address, response.Status, body)
}

// tryGet reads one object; notFound is an outcome.
func tryGet[T any](i *instance, kind, name string) (value T, notFound bool, err error) {
	notFound, err = read(i.collection(kind)+"/"+name, &value)
	return value, notFound, err
}

func get[T any](t testing.TB, i *instance, kind, name string) T {
	t.Helper()
	value, notFound, err := tryGet[T](i, kind, name)
	if err != nil || notFound {
		t.Fatalf("%s %s: not found %v, %v", kind, name, notFound, err)
	}
	return value
}

func tryList[T any](i *instance, kind string) ([]T, error) {
	var list struct {
		Kind  string `json:"kind"`
		Items []T    `json:"items"`
	}
	notFound, err := read(i.collection(kind), &list)
	if err != nil || notFound || !strings.HasSuffix(list.Kind, "List") {
		return nil, fmt.Errorf("list %s: not found %v, kind `%s`, %w", kind, notFound, list.Kind, err)
	}
	return list.Items, nil
}

func list[T any](t testing.TB, i *instance, kind string) []T {
	t.Helper()
	items, err := tryList[T](i, kind)
	if err != nil {
		t.Fatal(err)
	}
	return items
}

// until waits for a state of one object and returns it.
func until[T any](t testing.TB, i *instance, within time.Duration, kind, name, what string, holds func(T) bool) T {
	t.Helper()
	var value T
	eventually(t, within, fmt.Sprintf("%s %s: %s", kind, name, what), func() (bool, string) {
		var notFound bool
		var err error
		if value, notFound, err = tryGet[T](i, kind, name); err != nil {
			return false, err.Error()
		}
		if notFound {
			return false, "it does not exist"
		}
		text, _ := json.Marshal(value)
		return holds(value), string(text)
	})
	return value
}

// untilGone waits until an object does not exist.
func untilGone(t testing.TB, i *instance, within time.Duration, kind, name string) {
	t.Helper()
	eventually(t, within, fmt.Sprintf("%s %s goes away", kind, name), func() (bool, string) {
		_, notFound, err := tryGet[object](i, kind, name)
		return notFound, fmt.Sprintf("it exists (%v); %s", err, i.why(kind, name))
	})
}

// conditionOf finds a condition; its zero value when it was never set.
func conditionOf(conditions []condition, kind string) condition {
	for _, c := range conditions {
		if c.Type == kind {
			return c
		}
	}
	return condition{}
}

// volumeOf is the volume behind a claim, once it is bound.
func volumeOf(t testing.TB, i *instance, claim string) string {
	t.Helper()
	bound := until(t, i, 20*time.Second, "pvc", claim, "is bound", func(c claimObject) bool {
		return c.Status.Phase == "Bound" && c.Spec.VolumeName != ""
	})
	return get[persistentVolumeObject](t, i, "pv", bound.Spec.VolumeName).Spec.CSI.VolumeHandle
}

// replicasOf lists the replicas of a volume.
func replicasOf(t testing.TB, i *instance, volume string) []replicaObject {
	t.Helper()
	var own []replicaObject
	for _, r := range list[replicaObject](t, i, "replica") {
		if r.Spec.VolumeName == volume {
			own = append(own, r)
		}
	}
	return own
}

// engineOf is the engine of a volume.
func engineOf(t testing.TB, i *instance, volume string) engineObject {
	t.Helper()
	for _, e := range list[engineObject](t, i, "engine") {
		if e.Spec.VolumeName == volume {
			return e
		}
	}
	t.Fatalf("volume %s has no engine", volume)
	return engineObject{}
}

// untilRobust waits for a robustness of a volume.
func untilRobust(t testing.TB, i *instance, volume, robustness string) volumeObject {
	t.Helper()
	return until(t, i, 30*time.Second, "volume", volume, "is "+robustness, func(v volumeObject) bool {
		return v.Status.Robustness == robustness
	})
}

// untilState waits for a state of a volume.
func untilState(t testing.TB, i *instance, volume, state string) volumeObject {
	t.Helper()
	return until(t, i, 30*time.Second, "volume", volume, "is "+state, func(v volumeObject) bool {
		return v.Status.State == state
	})
}
