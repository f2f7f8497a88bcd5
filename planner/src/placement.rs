//! Where copies and replicas may lie.
//!
//! Each refusal is a sentence, so that "no place" can always say why, disk by disk.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::disk::{Disk, Disks, Health, Load};
use crate::setting::Settings;

/// Tags that somebody asks for.
#[derive(Clone, Copy, Debug)]
pub struct Selectors<'a> {
    /// Who asks, for messages: "the volume", "the image".
    pub who: &'a str,
    pub node: &'a [String],
    pub disk: &'a [String],
}

/// What places are chosen by.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub disks: &'a Disks,
    pub loads: &'a BTreeMap<String, Load>,
    pub settings: &'a Settings,
    pub selectors: &'a [Selectors<'a>],
    /// Disks that are out of the question: they have what is looked for.
    pub taken: &'a BTreeSet<String>,
    /// Disks from which the new ones shall lie apart: what they have stays there.
    pub beside: &'a BTreeSet<String>,
    /// Bytes of one copy or of one replica when it is full; 0 when not known yet.
    pub bytes: u64,
    pub random: u64,
}

/// A disk, and why it was chosen among those that could be, a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    pub disk: Disk,
    pub why: String,
}

/// The chosen disks, what has a place and waits, and why each other disk was not eligible.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    pub chosen: Vec<Chosen>,
    /// The nodes that are at their limit, once for each copy that would lie there.
    pub waiting: Vec<String>,
    /// `disk-1 of node-2: reason`, in the order of disks.
    pub refused: Vec<String>,
}

impl Choice {
    /// The refusals as one text.
    pub fn reasons(&self) -> String {
        if self.refused.is_empty() { "there is no other disk".into() } else { self.refused.join("; ") }
    }
}

/// Names of the images whose copies are being made although no replica asks for them, by node: one for each copy.
pub type Making = BTreeMap<String, Vec<String>>;

/// How many of these there may be on one node.
#[derive(Clone, Copy, Debug)]
pub struct Limit<'a> {
    pub per_node: u32,
    pub making: &'a Making,
}

impl Limit<'_> {
    /// Why nothing more begins on a node, a sentence.
    pub fn sentence(&self, node: &str) -> String {
        let images: BTreeSet<&str> = self.making.get(node).into_iter().flatten().map(String::as_str).collect();
        let images = images.into_iter().collect::<Vec<_>>().join(", ");
        format!(
            "on node {node} as many copies are being made (of {images}) as setting concurrent-backing-image-replenish-per-node-limit allows ({})",
            self.per_node
        )
    }
}

/// What a replica needs of its image where it lies.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    /// Bytes of a copy; 0 when not known yet.
    pub bytes: u64,
    /// Disks that have a copy, or room for one is taken there.
    pub held: &'a BTreeSet<String>,
    /// Those of them whose copy is there or nearly.
    pub preferred: &'a BTreeSet<String>,
}

/// Disks for further copies of an image: zones with the fewest first, then nodes; among equals nodes that are below the limit, then
/// those with most room, then by lot. A node at its limit is waited for rather than that two copies lie close together for ever.
pub fn choose_for_copies(request: &Request<'_>, count: usize, limit: Option<Limit<'_>>) -> Choice {
    choose(request, count, limit, None)
}

/// Disks for further replicas of a volume: zones with the fewest first, then nodes; among equals those that have a copy of the
/// image already, then those with most room, then by lot. Only where the image can be.
pub fn choose_for_replicas(request: &Request<'_>, count: usize, base: Base<'_>) -> Choice {
    choose(request, count, None, Some(base))
}

/// The disks that could take a replica now, and the bytes that may still be promised on each: those that
/// [`choose_for_replicas`] would choose among.
pub fn room_for_replicas<'a>(request: &Request<'a>, base: Base<'_>) -> Vec<(&'a Disk, u64)> {
    eligible(request, Some(base), &mut vec![])
}

/// Why a disk cannot take anything of these selectors, whatever its room.
pub fn refusal(disk: &Disk, selectors: &[Selectors<'_>], settings: &Settings) -> Option<String> {
    match &disk.health {
        Health::Ready => {}
        Health::NotReady(why) | Health::Unknown(why) => return Some(why.clone()),
    }
    if let Some(why) = &disk.unschedulable {
        return Some(why.clone());
    }
    if let Some(why) = disk.leaving(settings) {
        return Some(format!("it is being emptied: {why}"));
    }
    if disk.cordoned && settings.close_cordoned {
        return Some("its node is cordoned (setting disable-scheduling-on-cordoned-node)".into());
    }
    selectors.iter().find_map(|s| {
        refused_tags(s.who, "node", s.node, &disk.node_tags, settings.allow_empty_node_selector)
            .or_else(|| refused_tags(s.who, "disk", s.disk, &disk.tags, settings.allow_empty_disk_selector))
    })
}

fn refused_tags(who: &str, what: &str, wanted: &[String], tags: &[String], allow_empty: bool) -> Option<String> {
    if wanted.is_empty() && !tags.is_empty() && !allow_empty {
        return Some(format!("{who} has no {what} selector and this {what} is tagged `{}`", tags.join(",")));
    }
    let missing = wanted.iter().find(|tag| !tags.contains(tag))?;
    Some(format!("the {what} lacks the tag `{missing}` that {who} asks for"))
}

/// Bytes of image copies that still fit: what is free, less what is on its way, and never more than is unreserved.
fn copy_room(disk: &Disk, load: Load) -> u64 {
    let unreserved = disk.maximum_bytes.saturating_sub(disk.reserved_bytes).saturating_sub(load.copy_bytes);
    disk.available_bytes.saturating_sub(load.incoming_bytes).min(unreserved)
}

/// Bytes of replicas that may still be promised (LF 4.2): replicas are thin, so the over-provisioning setting applies.
pub(crate) fn replica_room(disk: &Disk, load: Load, settings: &Settings) -> u64 {
    let unreserved = u128::from(disk.maximum_bytes.saturating_sub(disk.reserved_bytes));
    let promised = unreserved * u128::from(settings.over_provisioning_percent) / 100;
    let taken = u128::from(load.replica_bytes) + u128::from(load.copy_bytes);
    u64::try_from(promised.saturating_sub(taken)).unwrap_or(u64::MAX)
}

/// A disk that could be chosen, and the bytes that are free there.
type Eligible<'a> = (&'a Disk, u64);

fn eligible<'a>(request: &Request<'a>, base: Option<Base<'_>>, refused: &mut Vec<String>) -> Vec<Eligible<'a>> {
    let mut eligible = vec![];
    for disk in request.disks.list.iter().filter(|d| !request.taken.contains(&d.id)) {
        let load = request.loads.get(&disk.id).copied().unwrap_or_default();
        let for_copies = copy_room(disk, load);
        let free = if base.is_some() { replica_room(disk, load, request.settings) } else { for_copies };
        let lacks_room = || {
            // A file of unknown size needs at least some room.
            let needed = request.bytes.max(1);
            (free < needed).then(|| format!("{free} bytes are free of {needed} needed"))
        };
        let lacks_base = || {
            let needed = base.filter(|b| !b.held.contains(&disk.id))?.bytes;
            (for_copies < needed)
                .then(|| format!("{for_copies} bytes are free of {needed} that a copy of the image needs there"))
        };
        match refusal(disk, request.selectors, request.settings).or_else(lacks_room).or_else(lacks_base) {
            Some(why) => refused.push(format!("{}: {why}", disk.label())),
            None => eligible.push((disk, free)),
        }
    }
    eligible
}

fn choose(request: &Request<'_>, count: usize, limit: Option<Limit<'_>>, base: Option<Base<'_>>) -> Choice {
    let mut choice = Choice::default();
    let mut eligible = eligible(request, base, &mut choice.refused);
    let beside = || request.disks.list.iter().filter(|d| request.beside.contains(&d.id));
    let mut zones: Taken = beside().map(|d| d.zone.clone()).collect();
    let mut nodes: Taken = beside().map(|d| d.node.clone()).collect();
    let making = limit.map(|l| l.making.iter().flat_map(|(node, images)| images.iter().map(|_| node.clone())));
    let mut making: Taken = making.into_iter().flatten().collect();
    while choice.chosen.len() + choice.waiting.len() < count {
        let is_busy = |node: &str| limit.is_some_and(|l| making.count(node) >= l.per_node as usize);
        let best = eligible
            .iter()
            .enumerate()
            .min_by_key(|(_, (disk, free))| {
                let spread = (zones.count(&disk.zone), nodes.count(&disk.node));
                let is_second = base.is_some_and(|b| !b.preferred.contains(&disk.id));
                (spread, is_busy(&disk.node), is_second, Reverse(*free), mix(request.random, &disk.id))
            })
            .map(|(index, _)| index);
        let Some(index) = best else { break };
        let of = eligible.len();
        let (disk, free) = eligible.remove(index);
        if is_busy(&disk.node) {
            choice.waiting.push(disk.node.clone());
        } else {
            let mut why = why(disk, free, of, (zones.count(&disk.zone), nodes.count(&disk.node)));
            if base.is_some_and(|b| b.preferred.contains(&disk.id)) {
                why += ", a copy of the image is there";
            }
            choice.chosen.push(Chosen { disk: disk.clone(), why });
            making.add(&disk.node);
        }
        zones.add(&disk.zone);
        nodes.add(&disk.node);
    }
    choice
}

fn why(disk: &Disk, free: u64, of: usize, (in_zone, on_node): (usize, usize)) -> String {
    let zone = if disk.zone.is_empty() { String::new() } else { format!("{in_zone} others in zone `{}`, ", disk.zone) };
    let disks = if of == 1 { "the only eligible disk" } else { &format!("one of {of} eligible disks") };
    format!("{disks}: {zone}{on_node} others on node {}, {free} bytes free", disk.node)
}

/// How often each zone or node was taken.
#[derive(Default)]
struct Taken(BTreeMap<String, usize>);

impl Taken {
    fn count(&self, name: &str) -> usize {
        self.0.get(name).copied().unwrap_or(0)
    }
    fn add(&mut self, name: &str) {
        *self.0.entry(name.to_owned()).or_default() += 1;
    }
}

impl FromIterator<String> for Taken {
    fn from_iter<I: IntoIterator<Item = String>>(names: I) -> Self {
        let mut taken = Taken::default();
        names.into_iter().for_each(|n| taken.add(&n));
        taken
    }
}

/// A number that depends on every bit of the random value and of the text (FNV-1a), to draw lots without a generator.
pub fn mix(random: u64, text: &str) -> u64 {
    let bytes = random.to_le_bytes();
    let hash = bytes
        .iter()
        .chain(text.as_bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3));
    // FNV's low bits mix well, its high bits less so for short texts.
    hash ^ (hash >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ready_disk;

    /// Why a disk cannot take 60 bytes for somebody who asks for `tag`; `None`: it can.
    fn refused(tag: Option<&str>, load: Load, change: impl FnOnce(&mut Disk)) -> Option<String> {
        let mut changed = ready_disk("a", 100);
        change(&mut changed);
        let disks = Disks { list: vec![changed], ..Default::default() };
        let wanted: Vec<String> = tag.into_iter().map(str::to_owned).collect();
        let settings =
            Settings { allow_empty_node_selector: false, allow_empty_disk_selector: false, ..Default::default() };
        let request = Request {
            disks: &disks,
            loads: &BTreeMap::from([("a".to_owned(), load)]),
            settings: &settings,
            selectors: &[Selectors { who: "the image", node: &[], disk: &wanted }],
            taken: &BTreeSet::new(),
            beside: &BTreeSet::new(),
            bytes: 60,
            random: 0,
        };
        let choice = choose_for_copies(&request, 1, None);
        assert_eq!(choice.chosen.len() + choice.refused.len(), 1);
        choice.refused.first().cloned()
    }

    #[test]
    fn every_reason_against_a_disk_is_said() {
        let none = Load::default();
        assert_eq!(refused(None, none, |_| ()), None);
        assert_eq!(refused(Some("ssd"), none, |d| d.tags = vec!["ssd".into()]), None);
        type Case<'a> = (Option<&'a str>, Load, fn(&mut Disk), &'a str);
        let cases: [Case<'_>; 11] = [
            (None, none, |d| d.health = Health::NotReady("down".into()), "down"),
            (None, none, |d| d.health = Health::Unknown("silent".into()), "silent"),
            (None, none, |d| d.unschedulable = Some("closed".into()), "closed"),
            (None, none, |d| d.evicting = true, "eviction is requested there"),
            (None, none, |d| d.cordoned = true, "disable-scheduling-on-cordoned-node"),
            (None, none, |d| d.tags = vec!["ssd".into()], "has no disk selector"),
            (None, none, |d| d.node_tags = vec!["fast".into()], "has no node selector"),
            (Some("ssd"), none, |_| (), "lacks the tag `ssd`"),
            (None, none, |d| d.available_bytes = 59, "59 bytes are free of 60 needed"),
            (None, Load { incoming_bytes: 41, ..none }, |_| (), "59 bytes are free of 60 needed"),
            (None, Load { copy_bytes: 31, ..none }, |d| d.reserved_bytes = 10, "59 bytes are free of 60 needed"),
        ];
        for (tag, load, change, why) in cases {
            let said = refused(tag, load, change).unwrap_or_else(|| panic!("taken: {why}"));
            assert!(said.starts_with("a of node-a: ") && said.contains(why), "{said}");
        }
    }

    #[test]
    fn a_disk_is_gone_only_when_every_node_has_told() {
        let mut disks = Disks { list: vec![ready_disk("a", 100)], ..Default::default() };
        assert!(!disks.is_gone("b"), "no node has told anything");
        disks.nodes.insert("node-a".into(), Health::Ready);
        assert!(disks.is_gone("b") && !disks.is_gone("a"));
        disks.incomplete.insert("node-c".into());
        assert!(!disks.is_gone("b"));
    }

    #[test]
    fn a_node_that_has_not_reported_each_of_its_disks_is_incomplete() {
        let mut node = api::Node::new("n", Default::default());
        node.spec.disks.insert("disk-1".into(), Default::default());
        let disks = Disks::of(&[node]);
        assert!(disks.incomplete.contains("n") && !disks.is_gone("x"));
    }

    #[test]
    fn a_disk_is_what_it_reports_on_a_node_that_works_and_what_the_user_allows() {
        use api::{Condition, ConditionStatus, names::condition::READY};
        let is = |status| vec![Condition::new(READY, status, "", "why")];
        let seen = |node_ready, uuid: &str, allowed| {
            let mut node = api::Node::new("n", Default::default());
            let spec = api::node::DiskSpec { allow_scheduling: allowed, ..Default::default() };
            node.spec.disks.insert("disk-1".into(), spec);
            let status = node.status.get_or_insert_default();
            status.conditions = is(node_ready);
            let conditions = is(ConditionStatus::True);
            let disk = api::node::DiskStatus { disk_uuid: uuid.into(), conditions, ..Default::default() };
            status.disk_status.insert("disk-1".into(), disk);
            Disks::of(&[node])
        };
        let well = seen(ConditionStatus::True, "d", true);
        assert_eq!((&well.list[0].health, &well.list[0].unschedulable), (&Health::Ready, &None));
        let away = seen(ConditionStatus::Unknown, "d", true);
        assert_eq!(away.list[0].health, Health::Unknown("node n does not answer: why".into()));
        let closed = seen(ConditionStatus::True, "d", false);
        assert_eq!(closed.list[0].unschedulable.as_deref(), Some("scheduling is switched off there"));
        let unnamed = seen(ConditionStatus::True, "", true);
        assert!(unnamed.list.is_empty() && unnamed.incomplete.contains("n"), "its UUID is not known yet");
    }
}
