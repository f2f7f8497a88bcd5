package sanitytests

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

// Volumes lie on the content of an image, so what it is made from is settled with its first copy; only a dead address is replaced.
func TestWhatAnImageIsMadeFromCannotChangeOnceACopyIsReady(t *testing.T) {
	t.Parallel()
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	url := serve(t, image.path) + "/" + filepath.Base(image.path)
	const name = "settled"
	removeImage(t, i, name)
	i.cli(t, "image", "create", name, "--url", url, "--min-copies", "1", "--wait", "--timeout", "30s")
	refused := func(field string, change func(spec map[string]any)) {
		t.Helper()
		code, answer := put(t, i, "backingimage", name, func(o map[string]any) { change(spec(o)) })
		if code != http.StatusUnprocessableEntity {
			t.Errorf("%s: %d, want 422: %s", field, code, answer)
		}
		mentions(t, "PUT of "+field, answer, "spec."+field, "cannot be changed any more", "a copy of the image is ready")
	}
	elsewhere := func(s map[string]any) {
		s["sourceParameters"].(map[string]any)["url"] = "http://images.invalid/new.raw"
	}
	refused("sourceType", func(s map[string]any) { s["sourceType"] = "upload" })
	refused("checksum", func(s map[string]any) { s["checksum"] = strings.Repeat("b", 128) })
	refused("sourceParameters[url]", elsewhere)
	pin := func(o map[string]any) { spec(o)["checksum"] = image.checksum }
	mustPut(t, i, "backingimage", name, pin)
	mustPut(t, i, "backingimage", name, func(o map[string]any) { elsewhere(spec(o)) })
	i.cli(t, "image", "wait", name, "--timeout", "10s")
}
