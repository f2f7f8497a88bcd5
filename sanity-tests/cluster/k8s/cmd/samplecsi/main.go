// samplecsi is a small CSI driver that proves the cluster without ours: a volume is a file in
// a folder that every node of the one machine shares, a node's device is a
// loop device on that file. It can create, delete, attach, detach, grow,
// snapshot and restore; it is no model of how to keep data.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const block = 4096

type driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer
	name, node, dir string
	mu              sync.Mutex
}

func run(name string, arg ...string) (string, error) {
	out, err := exec.Command(name, arg...).CombinedOutput()
	s := strings.TrimSpace(string(out))
	if err != nil {
		err = status.Errorf(codes.Internal, "%s %s: %v: %s", name, strings.Join(arg, " "), err, s)
	}
	return s, err
}

func (d *driver) vol(id string) string  { return filepath.Join(d.dir, "vol", filepath.Base(id)) }
func (d *driver) snap(id string) string { return filepath.Join(d.dir, "snap", filepath.Base(id)) }
func (d *driver) link(id, node string) string {
	return filepath.Join(d.dir, "attached", filepath.Base(id)+"@"+node)
}

func size(r *csi.CapacityRange) int64 {
	n := r.GetRequiredBytes()
	if n == 0 {
		n = 64 << 20
	}
	return (n + block - 1) / block * block
}

func (d *driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: d.name, VendorVersion: "1"}, nil
}

func (d *driver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}

func (d *driver) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{
		{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}}},
		{Type: &csi.PluginCapability_VolumeExpansion_{VolumeExpansion: &csi.PluginCapability_VolumeExpansion{Type: csi.PluginCapability_VolumeExpansion_ONLINE}}},
	}}, nil
}

func (d *driver) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	r := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
	} {
		r.Capabilities = append(r.Capabilities, &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}})
	}
	return r, nil
}

func (d *driver) CreateVolume(_ context.Context, q *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	id, n := q.GetName(), size(q.GetCapacityRange())
	if _, err := os.Stat(d.vol(id)); err != nil {
		if s := q.GetVolumeContentSource().GetSnapshot().GetSnapshotId(); s != "" {
			if _, err := run("cp", "--sparse=always", d.snap(s), d.vol(id)); err != nil {
				return nil, err
			}
		}
		if _, err := run("truncate", "-s", fmt.Sprintf("%d", n), d.vol(id)); err != nil {
			return nil, err
		}
	}
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{VolumeId: id, CapacityBytes: n, ContentSource: q.GetVolumeContentSource()}}, nil
}

func (d *driver) DeleteVolume(_ context.Context, q *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if err := os.Remove(d.vol(q.GetVolumeId())); err != nil && !os.IsNotExist(err) {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.DeleteVolumeResponse{}, nil
}

func (d *driver) ValidateVolumeCapabilities(_ context.Context, q *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{VolumeCapabilities: q.GetVolumeCapabilities()}}, nil
}

func (d *driver) ControllerPublishVolume(_ context.Context, q *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	if _, err := os.Stat(d.vol(q.GetVolumeId())); err != nil {
		return nil, status.Error(codes.NotFound, err.Error())
	}
	others, _ := filepath.Glob(d.link(q.GetVolumeId(), "*"))
	for _, o := range others {
		if o != d.link(q.GetVolumeId(), q.GetNodeId()) {
			return nil, status.Errorf(codes.FailedPrecondition, "attached elsewhere: %s", filepath.Base(o))
		}
	}
	if err := os.WriteFile(d.link(q.GetVolumeId(), q.GetNodeId()), nil, 0o644); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.ControllerPublishVolumeResponse{PublishContext: map[string]string{"file": d.vol(q.GetVolumeId())}}, nil
}

func (d *driver) ControllerUnpublishVolume(_ context.Context, q *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	os.Remove(d.link(q.GetVolumeId(), q.GetNodeId()))
	return &csi.ControllerUnpublishVolumeResponse{}, nil
}

func (d *driver) ControllerExpandVolume(_ context.Context, q *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	n := size(q.GetCapacityRange())
	if _, err := run("truncate", "-s", fmt.Sprintf("%d", n), d.vol(q.GetVolumeId())); err != nil {
		return nil, err
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: n, NodeExpansionRequired: true}, nil
}

func (d *driver) CreateSnapshot(_ context.Context, q *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	id := q.GetName()
	if _, err := os.Stat(d.snap(id)); err != nil {
		run("sync")
		if _, err := run("cp", "--sparse=always", d.vol(q.GetSourceVolumeId()), d.snap(id)); err != nil {
			return nil, err
		}
	}
	st, err := os.Stat(d.snap(id))
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.CreateSnapshotResponse{Snapshot: &csi.Snapshot{SnapshotId: id, SourceVolumeId: q.GetSourceVolumeId(), SizeBytes: st.Size(), CreationTime: timestamppb.New(st.ModTime()), ReadyToUse: true}}, nil
}

func (d *driver) DeleteSnapshot(_ context.Context, q *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	os.Remove(d.snap(q.GetSnapshotId()))
	return &csi.DeleteSnapshotResponse{}, nil
}

func (d *driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: d.node, MaxVolumesPerNode: 32}, nil
}

func (d *driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	r := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
	} {
		r.Capabilities = append(r.Capabilities, &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}}})
	}
	return r, nil
}

// device answers the volume's loop device, making it where there is none.
func (d *driver) device(id string, make bool) (string, error) {
	out, err := run("losetup", "-n", "-O", "NAME", "-j", d.vol(id))
	if err != nil || out != "" || !make {
		return strings.TrimSpace(strings.SplitN(out, "\n", 2)[0]), err
	}
	return run("losetup", "--find", "--show", d.vol(id))
}

func mounted(p string) bool { return exec.Command("mountpoint", "-q", p).Run() == nil }

func bind(from, to string, ro bool) error {
	if _, err := run("mount", "--bind", from, to); err != nil {
		return err
	}
	if ro {
		_, err := run("mount", "-o", "remount,bind,ro", to)
		return err
	}
	return nil
}

func (d *driver) NodeStageVolume(_ context.Context, q *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if q.GetPublishContext()["file"] == "" {
		return nil, status.Error(codes.InvalidArgument, "no publish context")
	}
	dev, err := d.device(q.GetVolumeId(), true)
	if err != nil {
		return nil, err
	}
	m := q.GetVolumeCapability().GetMount()
	if m == nil || mounted(q.GetStagingTargetPath()) {
		return &csi.NodeStageVolumeResponse{}, nil
	}
	fs := m.GetFsType()
	if fs == "" {
		fs = "ext4"
	}
	if out, _ := run("blkid", "-p", "-s", "TYPE", "-o", "value", dev); out == "" {
		if _, err := run("mkfs."+fs, dev); err != nil {
			return nil, err
		}
	}
	// Offline, since ext4 grows online only for a process with CAP_SYS_RESOURCE.
	if fs == "ext4" {
		run("e2fsck", "-f", "-p", dev)
		if _, err := run("resize2fs", dev); err != nil {
			return nil, err
		}
	}
	arg := []string{"-t", fs}
	if f := m.GetMountFlags(); len(f) > 0 {
		arg = append(arg, "-o", strings.Join(f, ","))
	}
	if _, err := run("mount", append(arg, dev, q.GetStagingTargetPath())...); err != nil {
		return nil, err
	}
	if fs == "xfs" {
		_, err = run("xfs_growfs", q.GetStagingTargetPath())
	}
	return &csi.NodeStageVolumeResponse{}, err
}

func (d *driver) NodeUnstageVolume(_ context.Context, q *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if mounted(q.GetStagingTargetPath()) {
		if _, err := run("umount", q.GetStagingTargetPath()); err != nil {
			return nil, err
		}
	}
	dev, err := d.device(q.GetVolumeId(), false)
	if err == nil && dev != "" {
		_, err = run("losetup", "-d", dev)
	}
	return &csi.NodeUnstageVolumeResponse{}, err
}

func (d *driver) NodePublishVolume(_ context.Context, q *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	to := q.GetTargetPath()
	if mounted(to) {
		return &csi.NodePublishVolumeResponse{}, nil
	}
	if q.GetVolumeCapability().GetBlock() == nil {
		if err := os.MkdirAll(to, 0o750); err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		return &csi.NodePublishVolumeResponse{}, bind(q.GetStagingTargetPath(), to, q.GetReadonly())
	}
	dev, err := d.device(q.GetVolumeId(), false)
	if err != nil || dev == "" {
		return nil, status.Errorf(codes.FailedPrecondition, "not staged: %v", err)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o750); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	if err := os.WriteFile(to, nil, 0o600); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.NodePublishVolumeResponse{}, bind(dev, to, false)
}

func (d *driver) NodeUnpublishVolume(_ context.Context, q *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	// A bind of a device on a file is a mount point too, which mountpoint(1) knows.
	if mounted(q.GetTargetPath()) {
		if _, err := run("umount", q.GetTargetPath()); err != nil {
			return nil, err
		}
	}
	os.Remove(q.GetTargetPath())
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

func (d *driver) NodeExpandVolume(_ context.Context, q *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	dev, err := d.device(q.GetVolumeId(), false)
	if err == nil {
		_, err = run("losetup", "-c", dev)
	}
	if m := q.GetVolumeCapability().GetMount(); err == nil && m != nil {
		if m.GetFsType() == "xfs" {
			_, err = run("xfs_growfs", q.GetVolumePath())
		} else {
			_, err = run("resize2fs", dev)
		}
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: q.GetCapacityRange().GetRequiredBytes()}, err
}

func main() {
	d := &driver{}
	endpoint := flag.String("endpoint", "", "unix socket to serve on")
	flag.StringVar(&d.name, "name", "sample.csi.example", "driver name")
	flag.StringVar(&d.node, "node-id", "", "node's name")
	flag.StringVar(&d.dir, "dir", "", "folder of the volumes")
	flag.Parse()
	for _, s := range []string{"vol", "snap", "attached"} {
		if err := os.MkdirAll(filepath.Join(d.dir, s), 0o755); err != nil {
			log.Fatal(err)
		}
	}
	sock := strings.TrimPrefix(*endpoint, "unix://")
	os.Remove(sock)
	lis, err := net.Listen("unix", sock)
	if err != nil {
		log.Fatal(err)
	}
	g := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, q any, i *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		t := time.Now()
		r, err := h(ctx, q)
		log.Printf("%s %v err=%v req={%v}", i.FullMethod, time.Since(t).Round(time.Millisecond), err, q)
		return r, err
	}))
	csi.RegisterIdentityServer(g, d)
	csi.RegisterControllerServer(g, d)
	csi.RegisterNodeServer(g, d)
	log.Fatal(g.Serve(lis))
}
