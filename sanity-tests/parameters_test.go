package sanitytests

import (
	"maps"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"sigs.k8s.io/yaml"
)

// Every parameter wrong in turn: the code is right, the message names the parameter, and nothing is created.
func TestWrongParametersAreRefused(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	other := strings.Repeat("ab", 64)

	i.apply(t, imageYAML("existing", url, image.checksum, 1))
	removeImage(t, i, "existing")
	untilImageReady(t, i, "existing")

	absent := imageParameters("absent", url, image.checksum, 1)
	existing := imageParameters("existing", url, image.checksum, 1)
	invalid := []codes.Code{codes.InvalidArgument}
	differs := []codes.Code{codes.AlreadyExists, codes.InvalidArgument}
	notOffered := []codes.Code{codes.InvalidArgument, codes.Unimplemented}

	cases := []struct {
		name     string
		base     map[string]string
		key      string
		value    string
		codes    []codes.Code
		mentions []string
	}{
		{"image name with a path", absent, "backingImage", "../etc/passwd", invalid, []string{"backingImage", "../etc/passwd"}},
		{"unknown source type", absent, "backingImageDataSourceType", "torrent", invalid, []string{"backingImageDataSourceType", "torrent", "download"}},
		{"upload needs a person", absent, "backingImageDataSourceType", "upload", notOffered, []string{"upload"}},
		{"restore is not offered", absent, "backingImageDataSourceType", "restore", notOffered, []string{"restore"}},
		{"nothing says how to make an absent image", map[string]string{"backingImage": "absent"}, "numberOfReplicas", "1", []codes.Code{codes.NotFound}, []string{"absent"}},
		{"parameters are no JSON", absent, "backingImageDataSourceParameters", "url=http://x", invalid, []string{"backingImageDataSourceParameters"}},
		{"JSON with a number", absent, "backingImageDataSourceParameters", `{"url": 5}`, invalid, []string{"backingImageDataSourceParameters", "5"}},
		{"JSON with a nested object", absent, "backingImageDataSourceParameters", `{"url": {"a": "b"}}`, invalid, []string{"backingImageDataSourceParameters"}},
		{"JSON list", absent, "backingImageDataSourceParameters", `["url"]`, invalid, []string{"backingImageDataSourceParameters"}},
		{"no url", absent, "backingImageDataSourceParameters", `{}`, invalid, []string{"url"}},
		{"url of another scheme", absent, "backingImageDataSourceParameters", `{"url": "file:///etc/passwd"}`, invalid, []string{"http"}},
		{"checksum too short", absent, "backingImageChecksum", "abc", invalid, []string{"backingImageChecksum", "abc", "128"}},
		{"checksum not hexadecimal", absent, "backingImageChecksum", strings.Repeat("zz", 64), invalid, []string{"backingImageChecksum"}},
		{"negative number of copies", absent, "backingImageMinNumberOfCopies", "-1", invalid, []string{"backingImageMinNumberOfCopies", "-1"}},
		{"number of copies is a word", absent, "backingImageMinNumberOfCopies", "two", invalid, []string{"backingImageMinNumberOfCopies", "two"}},
		{"negative number of replicas", absent, "numberOfReplicas", "-3", invalid, []string{"numberOfReplicas", "-3"}},
		{"number of replicas is a word", absent, "numberOfReplicas", "many", invalid, []string{"numberOfReplicas", "many"}},
		{"negative stale timeout", absent, "staleReplicaTimeout", "soon", invalid, []string{"staleReplicaTimeout", "soon"}},
		{"unknown data engine", absent, "dataEngine", "v3", invalid, []string{"dataEngine", "v3"}},
		{"data engine v2", absent, "dataEngine", "v2", notOffered, []string{"dataEngine", "v2"}},
		{"unknown key", absent, "backingImageChecksun", "x", invalid, []string{"backingImageChecksun", "backingImageChecksum"}},
		{"encrypted is not offered", absent, "encrypted", "true", notOffered, []string{"encrypted"}},

		{"another type than the image's", existing, "backingImageDataSourceType", "upload", append(differs, codes.Unimplemented), []string{"existing", "upload", "download"}},
		{"another url than the image's", existing, "backingImageDataSourceParameters", `{"url": "http://elsewhere.example/x"}`, differs, []string{"existing", "http://elsewhere.example/x"}},
		{"another checksum than the image's", existing, "backingImageChecksum", other, differs, []string{"existing", other[:16], image.checksum[:16]}},
		{"another number of copies", existing, "backingImageMinNumberOfCopies", "2", differs, []string{"existing", "2"}},
		{"another node selector", existing, "backingImageNodeSelector", "fast", differs, []string{"existing", "fast"}},
		{"another disk selector", existing, "backingImageDiskSelector", "ssd", differs, []string{"existing", "ssd"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			parameters := maps.Clone(c.base)
			parameters[c.key] = c.value
			if c.value == "" {
				delete(parameters, c.key)
			}
			name := "wrong-" + strings.NewReplacer(" ", "-", "'", "").Replace(strings.ToLower(c.name))
			response, err := i.controller(t).CreateVolume(call(t), createRequest(name, 32*mib, parameters))
			if err == nil {
				i.controller(t).DeleteVolume(call(t), &csi.DeleteVolumeRequest{VolumeId: response.Volume.VolumeId})
				t.Fatalf("accepted: %v", response.Volume)
			}
			if code := status.Code(err); !contains(c.codes, code) {
				t.Errorf("code %s, want one of %v: %v", code, c.codes, err)
			}
			mentions(t, "the error", status.Convert(err).Message(), c.mentions...)
			if _, notFound, err := tryGet[volumeObject](i, "volume", name); err != nil || !notFound {
				t.Errorf("a refused request left a volume behind (%v)", err)
			}
			claimSaysWhy(t, i, name, parameters, 32, c.mentions)
		})
	}
	noTemporaryFiles(t, i, "absent")
	if _, notFound, err := tryGet[imageObject](i, "backingimage", "absent"); err != nil || !notFound {
		t.Errorf("a refused request left an image behind (%v)", err)
	}
}

// claimSaysWhy makes a StorageClass and a claim on it that cannot be served, which is not bound and says why.
func claimSaysWhy(t *testing.T, i *instance, name string, parameters map[string]string, sizeMiB int, parts []string) {
	t.Helper()
	class, err := yaml.Marshal(map[string]any{
		"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": map[string]string{"name": name},
		"provisioner": "driver.longhorn.io", "parameters": parameters,
	})
	if err != nil {
		t.Fatal(err)
	}
	i.apply(t, string(class)+"---\n"+claimYAML(name, name, sizeMiB, "Filesystem"))
	t.Cleanup(func() { i.run("", "delete", "pvc", name); i.run("", "delete", "storageclass", name) })
	eventually(t, 10*time.Second, "the claim says why it is not bound", func() (bool, string) {
		text := i.why("pvc", name)
		return says(text, append(parts, name)), text
	})
	if claim := get[claimObject](t, i, "pvc", name); claim.Status.Phase != "Pending" {
		t.Errorf("the claim is %s", claim.Status.Phase)
	}
}

func contains[T comparable](list []T, wanted T) bool {
	for _, item := range list {
		if item == wanted {
			return true
		}
	}
	return false
}

// The documented alias names the image as well; both at once must agree.
func TestBackingImageNameIsAnAlias(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	i.apply(t, imageYAML("alias", url, image.checksum, 1))
	removeImage(t, i, "alias")
	untilImageReady(t, i, "alias")

	volume := createVolume(t, i, createRequest("by-alias", 32*mib, map[string]string{"backingImageName": "alias", "numberOfReplicas": "1"}))
	if got := get[volumeObject](t, i, "volume", volume.VolumeId).Spec.BackingImage; got != "alias" {
		t.Errorf("the volume uses image `%s`", got)
	}
	both := map[string]string{"backingImageName": "alias", "backingImage": "another"}
	if _, err := i.controller(t).CreateVolume(call(t), createRequest("by-both", 32*mib, both)); status.Code(err) != codes.InvalidArgument {
		t.Errorf("two names for one image: %v", err)
	}
}

func TestVolumeSmallerThanItsImageIsRefused(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 32)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	i.apply(t, imageYAML("larger", url, image.checksum, 1))
	removeImage(t, i, "larger")
	untilImageReady(t, i, "larger")

	_, err := i.controller(t).CreateVolume(call(t), createRequest("smaller", 16*mib, map[string]string{"backingImage": "larger", "numberOfReplicas": "1"}))
	if status.Code(err) != codes.OutOfRange {
		t.Errorf("want OutOfRange: %v", err)
	}
	mentions(t, "the error", status.Convert(err).Message(), "33554432")
	claimSaysWhy(t, i, "smaller-claim", map[string]string{"backingImage": "larger", "numberOfReplicas": "1"}, 16, []string{"larger", "33554432"})

	unsized := createRequest("unsized", 0, map[string]string{"backingImage": "larger", "numberOfReplicas": "1"})
	unsized.CapacityRange = nil
	if volume := createVolume(t, i, unsized); volume.CapacityBytes != 32*mib {
		t.Errorf("without a size the volume has %d bytes, want the image's virtual size", volume.CapacityBytes)
	}
	limited := createRequest("limited", 0, map[string]string{"backingImage": "larger", "numberOfReplicas": "1"})
	limited.CapacityRange = &csi.CapacityRange{LimitBytes: 16 * mib}
	if _, err := i.controller(t).CreateVolume(call(t), limited); status.Code(err) != codes.OutOfRange {
		t.Errorf("a limit below the virtual size: want OutOfRange: %v", err)
	}
}

// Two calls of one name at once, a retry and a different request: one volume, one image.
func TestCreateVolumeTwiceAtOnce(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	removeImage(t, i, "twice")
	request := createRequest("twice", 32*mib, imageParameters("twice", url, image.checksum, 1))

	errs := make([]error, 4)
	var wait sync.WaitGroup
	for n := range errs {
		wait.Go(func() { _, errs[n] = i.controller(t).CreateVolume(call(t), request) })
	}
	wait.Wait()
	for _, err := range errs {
		if code := status.Code(err); code != codes.OK && code != codes.Aborted {
			t.Errorf("a call at the same time: %v", err)
		}
	}
	volume := createVolume(t, i, request)
	count := 0
	for _, v := range list[volumeObject](t, i, "volume") {
		if v.Metadata.Name == volume.VolumeId {
			count++
		}
	}
	if count != 1 {
		t.Errorf("%d volumes of one name", count)
	}
	larger := createRequest("twice", 64*mib, request.Parameters)
	if _, err := i.controller(t).CreateVolume(call(t), larger); status.Code(err) != codes.AlreadyExists {
		t.Errorf("the same name with another size: want AlreadyExists: %v", err)
	}
	changed := maps.Clone(request.Parameters)
	changed["numberOfReplicas"] = "2"
	if _, err := i.controller(t).CreateVolume(call(t), createRequest("twice", 32*mib, changed)); status.Code(err) != codes.AlreadyExists {
		t.Errorf("the same name with other parameters: want AlreadyExists: %v", err)
	}
}

// Two different requests of one name at once: one of them gets the volume, the other is told that it differs.
func TestCreateVolumeOfOneNameAndTwoSizesAtOnce(t *testing.T) {
	i := sharedInstance(t)
	sizes := []int64{32 * mib, 64 * mib, 32 * mib, 64 * mib}
	parameters := map[string]string{"numberOfReplicas": "1"}
	errs := make([]error, len(sizes))
	var wait sync.WaitGroup
	for n, size := range sizes {
		wait.Go(func() {
			request := createRequest("contended", size, parameters)
			// Exactly: a larger volume that exists already would do as well otherwise.
			request.CapacityRange.LimitBytes = size
			_, errs[n] = i.controller(t).CreateVolume(call(t), request)
		})
	}
	wait.Wait()
	winner := int64(0)
	for n, err := range errs {
		switch code := status.Code(err); code {
		case codes.OK:
			if winner != 0 && winner != sizes[n] {
				t.Errorf("a volume of %d bytes and one of %d", winner, sizes[n])
			}
			winner = sizes[n]
		case codes.Aborted:
		case codes.AlreadyExists:
			mentions(t, "the error", status.Convert(err).Message(), "size", "33554432", "67108864")
		default:
			t.Errorf("%d bytes: %v", sizes[n], err)
		}
	}
	if winner == 0 {
		t.Fatalf("nobody got the volume: %v", errs)
	}
	if volume := createVolume(t, i, createRequest("contended", winner, parameters)); volume.CapacityBytes != winner {
		t.Errorf("the volume has %d bytes, want %d", volume.CapacityBytes, winner)
	}
}
