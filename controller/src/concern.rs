//! Which change concerns whom: who is told, and which passes it asks for.

use api::names::manager_name;
use api::{BackingImage, BackingImageDataSource, BackingImageManager, Engine, Node, Replica, Setting, Volume};
use kube::ResourceExt;
use planner::concern;
use planner::disk::Disk;

use crate::Shared;
use crate::cache::{Facet, Kept, Step};
use crate::queue::{Kind, Queue};
use crate::teller::Teller;

/// A kind whose changes ask for passes.
pub trait Concern: Kept {
    /// Tells users what became of an object.
    fn tell(&self, is_gone: bool, teller: &mut Teller);

    /// Asks for the passes that a change is about, and no other.
    fn concern(step: &Step<Self>, shared: &Shared);
}

impl Concern for BackingImage {
    fn tell(&self, is_gone: bool, teller: &mut Teller) {
        teller.image(self, is_gone);
    }

    fn concern(step: &Step<Self>, shared: &Shared) {
        let Some(name) = step.either().next().map(ResourceExt::name_any) else { return };
        let queue = &shared.queue;
        queue.add(Kind::Image, &name);
        if concern::image_to_managers(step.sides()) {
            queue.add(Kind::DataSource, &name);
            step.either().flat_map(places).for_each(|disk| add_manager(queue, disk));
        }
        if concern::image_to_volumes(step.sides()) {
            for volume in shared.cache.of::<Volume>(&Facet::Image(name)) {
                queue.add(Kind::Volume, volume.name_any());
            }
        }
    }
}

impl Concern for BackingImageManager {
    fn tell(&self, is_gone: bool, teller: &mut Teller) {
        teller.manager(self, is_gone);
    }

    fn concern(step: &Step<Self>, shared: &Shared) {
        let queue = &shared.queue;
        step.either().for_each(|manager| queue.add(Kind::Manager, manager.name_any()));
        // An image that it holds no more waits for just that.
        for image in concern::manager_to_images(step.sides()) {
            // What is handed over is seen at the manager.
            let source = shared.cache.get::<BackingImageDataSource>(&image);
            if source.is_some_and(|source| !source.spec.file_transferred) {
                queue.add(Kind::DataSource, &image);
            }
            queue.add(Kind::Image, image);
        }
    }
}

impl Concern for BackingImageDataSource {
    fn tell(&self, is_gone: bool, teller: &mut Teller) {
        teller.data_source(self, is_gone);
    }

    fn concern(step: &Step<Self>, shared: &Shared) {
        for source in step.either() {
            shared.queue.add(Kind::DataSource, source.name_any());
            shared.queue.add(Kind::Image, source.name_any());
            add_manager(&shared.queue, &source.spec.disk_uuid);
        }
    }
}

impl Concern for Volume {
    fn tell(&self, is_gone: bool, teller: &mut Teller) {
        teller.volume(self, is_gone);
    }

    fn concern(step: &Step<Self>, shared: &Shared) {
        for volume in step.either() {
            shared.queue.add(Kind::Volume, volume.name_any());
            // An image only asks who uses it.
            if step.before.is_none() || step.after.is_none() {
                shared.queue.add(Kind::Image, &volume.spec.backing_image);
            }
        }
    }
}

impl Concern for Engine {
    fn tell(&self, is_gone: bool, teller: &mut Teller) {
        teller.engine(self, is_gone);
    }

    fn concern(step: &Step<Self>, shared: &Shared) {
        step.either().for_each(|engine| shared.queue.add(Kind::Volume, &engine.spec.volume_name));
    }
}

impl Concern for Replica {
    fn tell(&self, is_gone: bool, teller: &mut Teller) {
        teller.replica(self, is_gone);
    }

    fn concern(step: &Step<Self>, shared: &Shared) {
        let is_images = concern::replica_to_image(step.sides());
        for replica in step.either() {
            shared.queue.add(Kind::Volume, &replica.spec.volume_name);
            if is_images {
                shared.queue.add(Kind::Image, &replica.spec.backing_image);
            }
        }
    }
}

impl Concern for Node {
    fn tell(&self, is_gone: bool, teller: &mut Teller) {
        teller.node(self, is_gone);
    }

    fn concern(step: &Step<Self>, shared: &Shared) {
        if concern::node_to_all(step.sides()) {
            all(shared);
        }
    }
}

impl Concern for Setting {
    fn tell(&self, _: bool, _: &mut Teller) {}

    fn concern(step: &Step<Self>, shared: &Shared) {
        if concern::setting_to_all(step.sides()) {
            all(shared);
        }
    }
}

/// Asks for a pass over everything that is known.
pub fn all(shared: &Shared) {
    let Shared { queue, cache, .. } = shared;
    cache.all::<BackingImage>().iter().for_each(|image| queue.add(Kind::Image, image.name_any()));
    cache.disks_of_images().iter().for_each(|disk| add_manager(queue, disk));
    // What an image left behind is looked after by the agent of its disk.
    let with_files = |disk: &&Disk| disk.holds_image_files;
    cache.nodes().disks.list.iter().filter(with_files).for_each(|disk| add_manager(queue, &disk.id));
    cache.all::<BackingImageManager>().iter().for_each(|manager| queue.add(Kind::Manager, manager.name_any()));
    cache.all::<BackingImageDataSource>().iter().for_each(|source| queue.add(Kind::DataSource, source.name_any()));
    nodes(shared);
    cache.all::<Volume>().iter().for_each(|volume| queue.add(Kind::Volume, volume.name_any()));
}

/// Asks for a pass over every node.
pub fn nodes(shared: &Shared) {
    shared.cache.all::<Node>().iter().for_each(|node| shared.queue.add(Kind::Node, node.name_any()));
}

/// Where an image has copies, or wants them.
fn places(image: &BackingImage) -> impl Iterator<Item = &String> {
    let held = image.status.iter().flat_map(|status| status.disk_file_status_map.keys());
    image.spec.disk_file_spec_map.keys().chain(held)
}

fn add_manager(queue: &Queue, disk: &str) {
    if let Ok(disk) = disk.parse() {
        queue.add(Kind::Manager, manager_name(&disk));
    }
}

#[cfg(test)]
mod tests;
