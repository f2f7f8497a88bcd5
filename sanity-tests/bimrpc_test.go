package sanitytests

import (
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

// A client made from the .proto alone, as Longhorn's own tools are, lists what a manager has.
func TestManagerSpeaksBimrpc(t *testing.T) {
	i := sharedInstance(t)
	image := ext4Image(t, 16)
	i.apply(t, imageYAML("over-bimrpc", serve(t, image.path)+"/"+filepath.Base(image.path), image.checksum, 1))
	removeImage(t, i, "over-bimrpc")
	object := untilImageReady(t, i, "over-bimrpc")

	service := compileProto(t, "../proto/bimrpc", "bimrpc.proto").Services().ByName("BackingImageManagerService")
	for disk := range object.Status.DiskFileStatusMap {
		manager := managerOf(t, i, disk)
		if manager.Status.CurrentState != "running" || manager.Status.IP == "" {
			t.Fatalf("the manager of disk %s: %+v", disk, manager.Status)
		}
		conn, err := grpc.NewClient(manager.Status.IP+":8000", grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()

		images := invoke(t, conn, service, "List", "").Get(field(service, "List", "backing_images")).Map()
		listed := images.Get(protoreflect.ValueOfString("over-bimrpc").MapKey())
		if !listed.IsValid() {
			t.Fatalf("List does not know the image: %v", images)
		}
		one := invoke(t, conn, service, "Get", `{"name": "over-bimrpc", "uuid": "`+object.Status.UUID+`"}`)
		for what, message := range map[string]protoreflect.Message{"List": listed.Message(), "Get": one} {
			status := message.Get(message.Descriptor().Fields().ByName("status")).Message()
			state := status.Get(status.Descriptor().Fields().ByName("state")).String()
			checksum := status.Get(status.Descriptor().Fields().ByName("checksum")).String()
			if state != "ready" || checksum != image.checksum {
				t.Errorf("%s: state `%s`, checksum `%s`", what, state, checksum)
			}
		}
		version := invoke(t, conn, service, "VersionGet", "")
		if api := version.Get(field(service, "VersionGet", "backing_image_manager_api_version")).Int(); api != 3 {
			t.Errorf("API version %d, want Longhorn's 3", api)
		}
	}
	if len(object.Status.DiskFileStatusMap) == 0 {
		t.Error("the image has no copy")
	}
}

func managerOf(t testing.TB, i *instance, disk string) managerObject {
	t.Helper()
	for _, m := range list[managerObject](t, i, "backingimagemanager") {
		if m.Spec.DiskUUID == disk {
			return m
		}
	}
	t.Fatalf("disk %s has no manager", disk)
	return managerObject{}
}

// invoke calls a method with a request in JSON.
func invoke(t testing.TB, conn *grpc.ClientConn, service protoreflect.ServiceDescriptor, method, request string) protoreflect.Message {
	t.Helper()
	descriptor := service.Methods().ByName(protoreflect.Name(method))
	input, output := dynamicpb.NewMessage(descriptor.Input()), dynamicpb.NewMessage(descriptor.Output())
	if request != "" {
		if err := protojson.Unmarshal([]byte(request), input); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Invoke(call(t), "/"+string(service.FullName())+"/"+method, input, output); err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	return output
}

func field(service protoreflect.ServiceDescriptor, method, name string) protoreflect.FieldDescriptor {
	return service.Methods().ByName(protoreflect.Name(method)).Output().Fields().ByName(protoreflect.Name(name))
}
