//! What happens to a volume: random stories.

use proptest::prelude::*;

/// By which way requests come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The loop device: whole sectors.
    Device,
    /// The engine's NBD socket: any byte.
    Nbd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    /// Zeroes; `allocate` keeps the space.
    Zero {
        allocate: bool,
    },
    Discard,
    Flush,
}

/// Where a request begins. Numbers are taken modulo what there is.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    Anywhere(u32),
    /// The first 64 KiB, where requests meet.
    Crowded(u16),
    /// Around the last byte of the image.
    AtImageEnd(i16),
    BeforeEnd(u16),
    /// Around the beginning of a cluster of a replica.
    AtCluster(u8, i8),
}

#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub kind: Kind,
    pub place: Place,
    pub length: u32,
}

/// What else happens while requests are in flight, or after them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Nothing,
    /// `kill -9` of the engine; its holder starts the next one.
    KillEngine,
    /// `kill -9` of holder and engine: the device is lost, the volume is attached again.
    KillBoth,
    /// `kill -9` of a replica, unless it is the last one.
    KillReplica(u8),
    /// Detached and attached again, after the requests.
    Reattach,
}

#[derive(Clone, Debug)]
pub struct Step {
    pub way: Way,
    pub requests: Vec<Request>,
    pub event: Event,
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        3 => any::<u32>().prop_map(Place::Anywhere),
        4 => any::<u16>().prop_map(Place::Crowded),
        3 => any::<i16>().prop_map(Place::AtImageEnd),
        1 => any::<u16>().prop_map(Place::BeforeEnd),
        2 => any::<(u8, i8)>().prop_map(|(cluster, by)| Place::AtCluster(cluster, by)),
    ]
}

fn request() -> impl Strategy<Value = Request> {
    let kind = prop_oneof![
        5 => Just(Kind::Write),
        2 => Just(Kind::Read),
        2 => any::<bool>().prop_map(|allocate| Kind::Zero { allocate }),
        1 => Just(Kind::Discard),
        1 => Just(Kind::Flush),
    ];
    let length = prop_oneof![5 => 1u32..8 << 10, 4 => 1u32..80 << 10, 1 => 1u32..700 << 10];
    (kind, place(), length).prop_map(|(kind, place, length)| Request { kind, place, length })
}

fn step() -> impl Strategy<Value = Step> {
    let way = prop_oneof![Just(Way::Device), Just(Way::Nbd)];
    let event = prop_oneof![
        10 => Just(Event::Nothing),
        2 => Just(Event::KillEngine),
        1 => Just(Event::KillBoth),
        1 => (0u8..3).prop_map(Event::KillReplica),
        2 => Just(Event::Reattach),
    ];
    let requests = prop::collection::vec(request(), 0..7);
    (way, requests, event).prop_map(|(way, requests, event)| Step { way, requests, event })
}

/// A story of a volume, and a number from which its size and the image's come.
pub fn strategy() -> impl Strategy<Value = (u16, Vec<Step>)> {
    (any::<u16>(), prop::collection::vec(step(), 6..16))
}
