package sanitytests

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/bufbuild/protocompile"
	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Our csi.proto says exactly what the official Go module says: what differs would be read wrongly by Kubernetes' sidecars.
func TestCSIDescriptorsEqualTheOfficialOnes(t *testing.T) {
	ours := flatten(compileProto(t, "../proto/csi", "csi.proto"))
	official := flatten(csi.File_csi_proto)
	if len(official) < 500 {
		t.Fatalf("only %d elements were compared: the comparison itself is broken", len(official))
	}
	var differences []string
	for name, want := range official {
		switch got, found := ours[name]; {
		case !found:
			differences = append(differences, fmt.Sprintf("missing: %s (%s)", name, want))
		case got != want:
			differences = append(differences, fmt.Sprintf("differs: %s is `%s`, official `%s`", name, got, want))
		}
	}
	for name, got := range ours {
		if _, found := official[name]; !found {
			differences = append(differences, fmt.Sprintf("not official: %s (%s)", name, got))
		}
	}
	slices.Sort(differences)
	for _, difference := range differences {
		t.Error(difference)
	}
}

// A comparison that notices nothing would be worthless.
func TestFlattenNoticesEveryKindOfDifference(t *testing.T) {
	original := map[string]string{"a.proto": `syntax = "proto3"; package p;
		message M { string a = 1; oneof o { int32 b = 2; } repeated int64 c = 3; } enum E { ZERO = 0; } service S { rpc R (M) returns (M); }`}
	base := flatten(compileSource(t, original))
	for name, source := range map[string]string{
		"number":  `syntax = "proto3"; package p; message M { string a = 4; oneof o { int32 b = 2; } repeated int64 c = 3; } enum E { ZERO = 0; } service S { rpc R (M) returns (M); }`,
		"type":    `syntax = "proto3"; package p; message M { bytes a = 1; oneof o { int32 b = 2; } repeated int64 c = 3; } enum E { ZERO = 0; } service S { rpc R (M) returns (M); }`,
		"label":   `syntax = "proto3"; package p; message M { string a = 1; oneof o { int32 b = 2; } int64 c = 3; } enum E { ZERO = 0; } service S { rpc R (M) returns (M); }`,
		"oneof":   `syntax = "proto3"; package p; message M { string a = 1; int32 b = 2; repeated int64 c = 3; } enum E { ZERO = 0; } service S { rpc R (M) returns (M); }`,
		"enum":    `syntax = "proto3"; package p; message M { string a = 1; oneof o { int32 b = 2; } repeated int64 c = 3; } enum E { NIL = 0; } service S { rpc R (M) returns (M); }`,
		"stream":  `syntax = "proto3"; package p; message M { string a = 1; oneof o { int32 b = 2; } repeated int64 c = 3; } enum E { ZERO = 0; } service S { rpc R (M) returns (stream M); }`,
		"options": `syntax = "proto3"; package p; message M { string a = 1 [deprecated = true]; oneof o { int32 b = 2; } repeated int64 c = 3; } enum E { ZERO = 0; } service S { rpc R (M) returns (M); }`,
	} {
		changed := flatten(compileSource(t, map[string]string{"a.proto": source}))
		equal := len(base) == len(changed)
		for key, value := range base {
			equal = equal && changed[key] == value
		}
		if equal {
			t.Errorf("a change of %s is not noticed", name)
		}
	}
}

func compileProto(t testing.TB, dir, name string) protoreflect.FileDescriptor {
	t.Helper()
	return compile(t, &protocompile.SourceResolver{ImportPaths: []string{dir}}, name)
}

func compileSource(t testing.TB, sources map[string]string) protoreflect.FileDescriptor {
	t.Helper()
	return compile(t, &protocompile.SourceResolver{Accessor: protocompile.SourceAccessorFromMap(sources)}, "a.proto")
}

func compile(t testing.TB, resolver protocompile.Resolver, name string) protoreflect.FileDescriptor {
	t.Helper()
	compiler := protocompile.Compiler{Resolver: protocompile.WithStandardImports(resolver)}
	files, err := compiler.Compile(context.Background(), name)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return files[0]
}

// flatten describes every element of a file by its full name.
func flatten(file protoreflect.FileDescriptor) map[string]string {
	elements := map[string]string{"package": string(file.Package()), "syntax": file.Syntax().String()}
	flattenMessages(elements, file.Messages())
	flattenEnums(elements, file.Enums())
	for n := range file.Extensions().Len() {
		extension := file.Extensions().Get(n)
		elements["extension "+string(extension.FullName())] = fmt.Sprintf("of %s %s", extension.ContainingMessage().FullName(), describeField(extension))
	}
	for n := range file.Services().Len() {
		service := file.Services().Get(n)
		elements["service "+string(service.FullName())] = options(service)
		for m := range service.Methods().Len() {
			method := service.Methods().Get(m)
			elements["method "+string(method.FullName())] = fmt.Sprintf("(%s stream=%v) returns (%s stream=%v) %s",
				method.Input().FullName(), method.IsStreamingClient(), method.Output().FullName(), method.IsStreamingServer(), options(method))
		}
	}
	return elements
}

func flattenMessages(elements map[string]string, messages protoreflect.MessageDescriptors) {
	for n := range messages.Len() {
		message := messages.Get(n)
		elements["message "+string(message.FullName())] = fmt.Sprintf("reserved %v %v %s", reserved(message), reservedNames(message), options(message))
		for f := range message.Fields().Len() {
			field := message.Fields().Get(f)
			elements["field "+string(field.FullName())] = describeField(field)
		}
		for o := range message.Oneofs().Len() {
			oneof := message.Oneofs().Get(o)
			elements["oneof "+string(oneof.FullName())] = fmt.Sprintf("synthetic=%v %s", oneof.IsSynthetic(), options(oneof))
		}
		flattenMessages(elements, message.Messages())
		flattenEnums(elements, message.Enums())
	}
}

func flattenEnums(elements map[string]string, enums protoreflect.EnumDescriptors) {
	for n := range enums.Len() {
		enum := enums.Get(n)
		elements["enum "+string(enum.FullName())] = options(enum)
		for v := range enum.Values().Len() {
			value := enum.Values().Get(v)
			elements["value "+string(value.FullName())] = fmt.Sprintf("%d %s", value.Number(), options(value))
		}
	}
}

func describeField(field protoreflect.FieldDescriptor) string {
	kind := field.Kind().String()
	if message := field.Message(); message != nil {
		kind += " " + string(message.FullName())
	}
	if enum := field.Enum(); enum != nil {
		kind += " " + string(enum.FullName())
	}
	oneof := ""
	if o := field.ContainingOneof(); o != nil {
		oneof = string(o.Name())
	}
	return fmt.Sprintf("%d %s %s map=%v packed=%v optional=%v oneof=%s json=%s %s", field.Number(), field.Cardinality(), kind,
		field.IsMap(), field.IsPacked(), field.HasOptionalKeyword(), oneof, field.JSONName(), options(field))
}

func reserved(message protoreflect.MessageDescriptor) (ranges [][2]protoreflect.FieldNumber) {
	for n := range message.ReservedRanges().Len() {
		ranges = append(ranges, message.ReservedRanges().Get(n))
	}
	return ranges
}

func reservedNames(message protoreflect.MessageDescriptor) (names []string) {
	for n := range message.ReservedNames().Len() {
		names = append(names, string(message.ReservedNames().Get(n)))
	}
	return names
}

// options are compared by their bytes, so that the file's own extensions (csi_secret, alpha_field…) count too.
func options(descriptor protoreflect.Descriptor) string {
	bytes, err := proto.MarshalOptions{Deterministic: true}.Marshal(descriptor.Options())
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("options=%x", bytes)
}
