//! What only a store in a file can promise: it survives kill -9, restarts and full disks, and belongs to one process.

#[path = "suite/mod.rs"]
mod suite;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use backing_image_store::embedded::Embedded;
use backing_image_store::{Preconditions, Selector, StoreError};
use serde_json::json;
use suite::{Any, at, brief_events, delete, gadgets, key, object, read, set, version, widget, widgets};

const CHILD: &str = "STORE_TEST_CHILD";

fn open(path: &Path) -> Any {
    Arc::new(Embedded::open(path).unwrap())
}

#[tokio::test]
async fn is_as_it_was_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let store = open(&path);
    let a = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let a = store.replace_status(&widgets(), set(&a, "/status", json!({"é": [1.5, null]}))).await.unwrap();
    store.create(&gadgets(), object(json!({"metadata": {"name": "g"}}))).await.unwrap();
    store.create(&widgets(), widget("b", 1)).await.unwrap();
    delete(&store, "b").await;
    let before = store.list(&widgets(), None, &Selector::default()).await.unwrap();
    drop(store);
    let store = open(&path);
    let after = store.list(&widgets(), None, &Selector::default()).await.unwrap();
    assert_eq!((&after.items, &after.resource_version), (&vec![a.clone()], &before.resource_version));
    // The history did not survive: whoever was behind is told.
    let mut behind = store.watch(&widgets(), None, Some(a.resource_version().into())).await.unwrap();
    let mut level = store.watch(&widgets(), None, Some(after.resource_version)).await.unwrap();
    let c = store.create(&widgets(), widget("c", 1)).await.unwrap();
    assert!(version(&c) > before.resource_version.parse().unwrap());
    assert_eq!(brief_events(&mut behind, 1).await, ["relist"]);
    assert_eq!(brief_events(&mut level, 1).await, ["+c 1"]);
}

#[tokio::test]
async fn collects_objects_whose_owner_went_unseen() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let store = open(&path);
    let owner = store.create(&widgets(), widget("owner", 1)).await.unwrap();
    let references = json!([{"apiVersion": "example.org/v1", "kind": "Widget", "name": "owner", "uid": owner.uid()}]);
    store.create(&widgets(), set(&widget("owned", 1), "/metadata/ownerReferences", references)).await.unwrap();
    drop(store);
    // As if the process had been killed between the two removals of a store that collects later.
    let database = redb::Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    let objects: redb::TableDefinition<'_, &str, &[u8]> = redb::TableDefinition::new("objects");
    transaction.open_table(objects).unwrap().remove("example.org/widgets/shop/owner").unwrap().unwrap();
    transaction.commit().unwrap();
    drop(database);
    let store = open(&path);
    suite::wait_until_gone(&store, &widgets(), &key("owned")).await;
}

#[tokio::test]
async fn belongs_to_one_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let _first = open(&path);
    let error = Embedded::open(&path).err().expect("the second one is refused");
    assert!(matches!(error, StoreError::InUse { .. }));
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()) && text.contains("stop that process"), "{text}");
}

#[test]
fn says_what_is_wrong_with_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let cause = |error: &StoreError| std::error::Error::source(error).unwrap().to_string();
    let absent = Embedded::open(&directory.path().join("absent/store.redb")).err().unwrap();
    assert!(absent.to_string().contains("absent/store.redb") && cause(&absent).contains("No such file"), "{absent}");
    let path = directory.path().join("store.redb");
    std::fs::write(&path, "this is a text file, and not a short one, so that it could be a header").unwrap();
    let error = Embedded::open(&path).err().unwrap();
    assert!(error.to_string().contains("cannot open store file"), "{error}");
    assert!(std::fs::read_to_string(&path).unwrap().starts_with("this is a text file"), "it is left alone");
    let newer = directory.path().join("newer.redb");
    let database = redb::Database::create(&newer).unwrap();
    let transaction = database.begin_write().unwrap();
    let meta: redb::TableDefinition<'_, &str, u64> = redb::TableDefinition::new("meta");
    transaction.open_table(meta).unwrap().insert("format", 2).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let error = Embedded::open(&newer).err().unwrap();
    assert!(cause(&error).contains("use a newer program"), "{}", cause(&error));
}

/// Not a test of its own: the process that gets killed. Says each write on its standard output once it is acknowledged.
#[tokio::test]
async fn writes_until_it_is_killed() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let store = open(Path::new(&path));
    let writers = (0..4).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for step in 0_u64.. {
                let name = format!("w-{writer}-{}", step % 17);
                let (action, object) = match read(&store, &name).await {
                    None => ("put", store.create(&widgets(), widget(&name, step as i64)).await.unwrap()),
                    Some(old) if step % 5 == 4 => {
                        let exact = Preconditions { uid: Some(old.uid().into()), resource_version: None };
                        ("del", store.delete(&widgets(), &key(&name), &exact).await.unwrap().unwrap())
                    }
                    Some(old) => {
                        let new = set(&old, "/spec/padding", "x".repeat((step % 3000) as usize));
                        (
                            "put",
                            store
                                .replace(&widgets(), set(&new, "/spec/step", json!([step, std::process::id()])))
                                .await
                                .unwrap(),
                        )
                    }
                };
                let mut out = std::io::stdout().lock();
                writeln!(out, "ack {action} {name} {}", object.resource_version()).unwrap();
                out.flush().unwrap();
            }
        })
    });
    futures::future::join_all(writers.collect::<Vec<_>>()).await;
}

#[tokio::test]
async fn keeps_every_acknowledged_write_through_kill_9() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    // Name → version of the last acknowledged write, `None` when that was its removal.
    let mut acknowledged: BTreeMap<String, (u64, bool)> = BTreeMap::new();
    for round in 1..=6 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["writes_until_it_is_killed", "--exact", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut note = |line: String| {
            let parts: Vec<_> = line.split(' ').collect();
            if let ["ack", action, name, version] = parts[..] {
                let version: u64 = version.parse().unwrap();
                assert!(acknowledged.values().all(|(v, _)| *v != version), "a version is given once");
                acknowledged.insert(name.to_owned(), (version, action == "put"));
                return 1;
            }
            0
        };
        let mut count = 0;
        while count < round * 60 {
            count += note(lines.next().expect("the child goes on").unwrap());
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // The last line may be cut off in the middle of a number; whole ones end in a line break, which `lines` hides.
        let rest: Vec<_> = lines.map_while(Result::ok).collect();
        for line in rest.iter().take(rest.len().saturating_sub(1)) {
            note(line.clone());
        }
        let store = open(&path);
        let list = store.list(&widgets(), None, &Selector::default()).await.unwrap();
        let highest = acknowledged.values().map(|(version, _)| *version).max().unwrap();
        assert!(list.resource_version.parse::<u64>().unwrap() >= highest, "versions never go back");
        let found: BTreeMap<_, _> = list.items.iter().map(|o| (o.name().to_owned(), version(o))).collect();
        for (name, (version, present)) in &acknowledged {
            match found.get(name) {
                Some(found) => {
                    assert!(found > version || (found == version && *present), "round {round}: {name} went back")
                }
                // Each writer has at most one write that was done and not said.
                None => assert!(
                    !present || unsaid_removals(&acknowledged, &found, name) <= 1,
                    "round {round}: {name} is lost"
                ),
            }
        }
    }
}

/// How many objects of the writer of `name` are gone without a word of it.
fn unsaid_removals(said: &BTreeMap<String, (u64, bool)>, found: &BTreeMap<String, u64>, name: &str) -> usize {
    let writer = &name[..4];
    said.iter().filter(|(n, (_, present))| n.starts_with(writer) && *present && !found.contains_key(*n)).count()
}

/// A small file system of its own, gone with it.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(size: &str) -> SmallDisk {
        let disk = SmallDisk(tempfile::tempdir().unwrap());
        disk.mount(&format!("size={size}"));
        disk
    }

    fn mount(&self, options: &str) {
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(self.0.path()).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn goes_on_after_a_full_disk() {
    let disk = SmallDisk::new("4m");
    let store = open(&disk.0.path().join("store.redb"));
    let mut watch = store.watch(&widgets(), None, None).await.unwrap();
    let mut made = vec![];
    let error = loop {
        let name = format!("w-{}", made.len());
        match store.create(&widgets(), set(&widget(&name, 1), "/spec/padding", "x".repeat(100_000))).await {
            Ok(_) => made.push(name),
            Err(error) => break error,
        }
        assert!(made.len() < 1000, "the disk is never full");
    };
    assert_eq!(error.kind(), api::ErrorKind::Unavailable);
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("No space left") || cause.contains("closed"), "{cause}");
    assert!(!made.is_empty());
    let list = store.list(&widgets(), None, &Selector::default()).await.unwrap();
    assert_eq!(list.items.len(), made.len(), "reading goes on, and shows nothing that may not be durable");
    disk.mount("remount,size=64m");
    let last = store.create(&widgets(), widget("last", 1)).await.unwrap();
    assert!(version(&last) > version(&list.items[0]));
    assert_eq!(at(&read(&store, "last").await.unwrap(), "/spec/size"), 1);
    // A watcher saw everything, or was told that it did not.
    let mut seen = vec![];
    loop {
        let event = suite::brief(&suite::next(&mut watch).await);
        if event == "relist" || event == "+last 1" {
            break;
        }
        seen.push(event);
    }
    assert!(seen.len() <= made.len());
}

#[tokio::test]
async fn shows_how_many_objects_there_are() {
    let store = Embedded::in_memory();
    let metrics = runtime::metrics::Metrics::default();
    store.register_metrics(&metrics);
    let store: Any = Arc::new(store);
    store.create(&widgets(), widget("a", 1)).await.unwrap();
    store.create(&widgets(), widget("b", 1)).await.unwrap();
    let text = metrics.render();
    assert!(text.contains("backing_image_csi_store_objects{kind=\"widgets.example.org\"} 2"), "{text}");
    assert!(text.contains("backing_image_csi_store_commit_seconds_count 2"), "{text}");
}
