//! One object at a time: what is filled in, kept, refused and removed.

use backing_image_store::{Preconditions, Selector, StoreError};
use serde_json::json;

use super::*;

pub async fn fills_in_system_fields_of_a_new_object(store: Any) {
    let given = object(json!({
        "metadata": {
            "name": "a", "namespace": "shop", "uid": "mine", "generation": 7,
            "creationTimestamp": null, "deletionTimestamp": "2020-01-01T00:00:00Z",
        },
        "spec": {"size": 1}, "status": {"ready": true},
    }));
    let made = store.create(&widgets(), given).await.unwrap();
    assert_eq!(at(&made, "/apiVersion"), "example.org/v1");
    assert_eq!(at(&made, "/kind"), "Widget");
    assert_eq!(at(&made, "/metadata/generation"), 1);
    assert_eq!((made.uid().len(), at(&made, "/status")), (36, &Value::Null));
    assert_eq!(at(&made, "/metadata/deletionTimestamp"), &Value::Null);
    let time = at(&made, "/metadata/creationTimestamp").as_str().unwrap();
    assert_eq!((time.len(), &time[19..]), (20, "Z"), "whole seconds, UTC: {time}");
    assert!(version(&made) > 0);
    assert_eq!(read(&store, "a").await.unwrap(), made);
}

pub async fn refuses_a_name_that_is_taken(store: Any) {
    let first = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let error = store.create(&widgets(), widget("a", 2)).await.unwrap_err();
    assert_eq!(error.to_string(), "Widget `a` exists already");
    assert_eq!(error.kind(), api::ErrorKind::Incompatible);
    assert_eq!(read(&store, "a").await.unwrap(), first);
}

pub async fn refuses_what_kubernetes_would_refuse(store: Any) {
    let widget_with = |pointer, value: Value| set(&widget("a", 1), pointer, value);
    let controller =
        |name: &str| json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": name, "controller": true});
    let cases = [
        (widget("", 1), "metadata.name must be 1 to 253"),
        (widget("A", 1), "metadata.name must be 1 to 253"),
        (widget("a..b", 1), "metadata.name must be 1 to 253"),
        (widget("a/b", 1), "metadata.name must be 1 to 253"),
        (widget("a_b", 1), "metadata.name must be 1 to 253"),
        (widget("-a", 1), "metadata.name must be 1 to 253"),
        (widget(&"a".repeat(254), 1), "metadata.name must be 1 to 253"),
        (widget_with("/metadata/name", 5.into()), "metadata.name must be text"),
        (widget_with("/metadata/namespace", "".into()), "this kind lives in namespaces"),
        (widget_with("/metadata/namespace", "a/b".into()), "metadata.namespace is `a/b`"),
        (widget_with("/kind", "Gadget".into()), "kind is \"Gadget\" and must be \"Widget\""),
        (widget_with("/apiVersion", "v1".into()), "apiVersion is \"v1\" and must be \"example.org/v1\""),
        (widget_with("/metadata/resourceVersion", "1".into()), "metadata.resourceVersion must be absent"),
        (widget_with("/metadata/labels", json!({"a": 1})), "metadata.labels `a` is 1 and must be text, in quotes"),
        (widget_with("/metadata/labels", json!({"a": "x y"})), "label `a` is `x y`"),
        (widget_with("/metadata/labels", json!({"": "x"})), "illegal key"),
        (widget_with("/metadata/finalizers", json!("x")), "metadata.finalizers must be a list"),
        (widget_with("/metadata/ownerReferences", json!([{"uid": "x"}])), "must have apiVersion, kind, name and uid"),
        (
            widget_with("/metadata/ownerReferences", json!([controller("x"), controller("y")])),
            "at most one of them may be the controller",
        ),
        (widget_with("/spec/size", "x".repeat(2_000_000).into()), "bytes as JSON"),
        (object(json!({"spec": {}})), "metadata must be an object"),
        (object(json!({"metadata": []})), "metadata must be an object"),
    ];
    for (bad, expected) in cases {
        let error = store.create(&widgets(), bad).await.unwrap_err();
        assert_eq!(error.kind(), api::ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(expected), "{error} should contain {expected}");
    }
    let error = store.create(&gadgets(), widget("a", 1)).await.unwrap_err();
    assert!(error.to_string().contains("this kind does not live in namespaces"), "{error}");
    let error = store.replace(&widgets(), widget("a", 1)).await.unwrap_err();
    assert_eq!(error.kind(), api::ErrorKind::NotFound);
    let list = store.list(&widgets(), None, &Selector::default()).await.unwrap();
    assert!(list.items.is_empty());
}

/// Longhorn allows more in the names of its own kinds. Where they are custom resources, Kubernetes has the last word and refuses these.
pub async fn allows_names_as_longhorn_does(store: Any) {
    let images = kind(api::names::GROUP, "BackingImage", true);
    for name in ["a_b", "ubuntu-24.04_", "1"] {
        store.create(&images, widget(name, 1)).await.unwrap();
    }
}

pub async fn makes_a_name_out_of_a_prefix(store: Any) {
    let prefix = object(json!({"metadata": {"generateName": "snap-", "namespace": "shop"}}));
    let first = store.create(&widgets(), prefix.clone()).await.unwrap();
    let second = store.create(&widgets(), prefix).await.unwrap();
    assert!(first.name().starts_with("snap-") && first.name().len() == 10, "{}", first.name());
    assert_ne!(first.name(), second.name());
}

pub async fn replaces_the_wish_and_keeps_the_status(store: Any) {
    let made = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let observed = store.replace_status(&widgets(), set(&made, "/status", json!({"ready": true}))).await.unwrap();
    let mut wish = set(&observed, "/spec/size", 2);
    wish.0["status"] = json!({"ready": false});
    let replaced = store.replace(&widgets(), wish).await.unwrap();
    assert_eq!((at(&replaced, "/spec/size"), at(&replaced, "/status/ready")), (&json!(2), &json!(true)));
    // Metadata belongs to the wish; what is left out is gone.
    let labeled = store.replace(&widgets(), set(&replaced, "/metadata/labels", json!({"a": "b"}))).await.unwrap();
    let mut bare = labeled.clone();
    bare.0.shift_remove("spec");
    bare.0["metadata"].as_object_mut().unwrap().shift_remove("labels");
    let bare = store.replace(&widgets(), bare).await.unwrap();
    assert_eq!((at(&bare, "/spec"), at(&bare, "/metadata/labels")), (&Value::Null, &Value::Null));
    assert_eq!(read(&store, "a").await.unwrap(), bare);
}

pub async fn replaces_the_status_and_keeps_the_wish(store: Any) {
    let made = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let mut report = set(&made, "/spec/size", 99);
    report.0["metadata"]["labels"] = json!({"a": "b"});
    report.0.insert("status".into(), json!({"ready": true}));
    let observed = store.replace_status(&widgets(), report).await.unwrap();
    assert_eq!((at(&observed, "/spec/size"), at(&observed, "/status/ready")), (&json!(1), &json!(true)));
    assert_eq!(at(&observed, "/metadata/labels"), &Value::Null);
    let mut nothing = observed.clone();
    nothing.0.shift_remove("status");
    let nothing = store.replace_status(&widgets(), nothing).await.unwrap();
    assert_eq!(at(&nothing, "/status"), &Value::Null);
}

pub async fn raises_the_generation_with_the_wish_only(store: Any) {
    let made = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let generation = |o: &Object| at(o, "/metadata/generation").as_i64().unwrap();
    let observed = store.replace_status(&widgets(), set(&made, "/status", json!({"x": 1}))).await.unwrap();
    let labeled = store.replace(&widgets(), set(&observed, "/metadata/labels", json!({"a": "b"}))).await.unwrap();
    assert_eq!((generation(&observed), generation(&labeled)), (1, 1));
    let wished = store.replace(&widgets(), set(&labeled, "/spec/size", 2)).await.unwrap();
    assert_eq!(generation(&wished), 2);
    let other_field = store.replace(&widgets(), set(&wished, "/value", "text")).await.unwrap();
    assert_eq!(generation(&other_field), 3);
}

pub async fn writes_nothing_when_nothing_changes(store: Any) {
    let made = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let observed = store.replace_status(&widgets(), set(&made, "/status", json!({"x": 1}))).await.unwrap();
    let mut watch = store.watch(&widgets(), None, Some(observed.resource_version().into())).await.unwrap();
    let again = store.replace_status(&widgets(), observed.clone()).await.unwrap();
    let once_more = store.replace(&widgets(), again.clone()).await.unwrap();
    assert_eq!((&again, &once_more), (&observed, &observed));
    store.create(&widgets(), widget("b", 2)).await.unwrap();
    assert_eq!(brief_events(&mut watch, 1).await, ["+b 2"], "no event before");
}

pub async fn refuses_a_write_that_rests_on_an_old_version(store: Any) {
    let old = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let new = store.replace(&widgets(), set(&old, "/spec/size", 2)).await.unwrap();
    for result in [
        store.replace(&widgets(), set(&old, "/spec/size", 3)).await,
        store.replace_status(&widgets(), set(&old, "/status", json!({}))).await,
        store.replace(&widgets(), old.clone()).await,
        store.replace(&widgets(), set(&new, "/metadata/uid", "of-one-that-was-deleted")).await,
    ] {
        let error = result.unwrap_err();
        assert!(error.is_conflict(), "{error}");
        assert_eq!(error.kind(), api::ErrorKind::Pending);
    }
    assert_eq!(read(&store, "a").await.unwrap(), new);
    // Without a version the last one wins, as in Kubernetes.
    let forced = store.replace(&widgets(), widget("a", 4)).await.unwrap();
    assert_eq!((at(&forced, "/spec/size"), forced.uid()), (&json!(4), old.uid()));
}

pub async fn never_changes_system_fields(store: Any) {
    let made = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let mut forged = set(&made, "/spec/size", 2);
    for (field, value) in [("creationTimestamp", json!("2001-01-01T00:00:00Z")), ("generation", json!(70))] {
        forged.0["metadata"][field] = value;
    }
    let kept = store.replace(&widgets(), forged).await.unwrap();
    assert_eq!(at(&kept, "/metadata/creationTimestamp"), at(&made, "/metadata/creationTimestamp"));
    assert_eq!(at(&kept, "/metadata/deletionTimestamp"), &Value::Null);
    assert_eq!(at(&kept, "/metadata/generation"), 2);
    assert_eq!(kept.uid(), made.uid());
    // Only a deletion begins one.
    let error = store.replace(&widgets(), set(&kept, "/metadata/deletionTimestamp", "2001-01-01T00:00:00Z")).await;
    let error = error.unwrap_err();
    assert_eq!(error.kind(), api::ErrorKind::Invalid, "{error}");
    assert!(error.to_string().contains("metadata.deletionTimestamp"), "{error}");
    assert_eq!(read(&store, "a").await.unwrap(), kept);
}

pub async fn keeps_an_object_while_it_has_finalizers(store: Any) {
    let finalizers = json!(["longhorn.io", "other"]);
    let made = store.create(&widgets(), set(&widget("a", 1), "/metadata/finalizers", finalizers)).await.unwrap();
    let marked = delete(&store, "a").await.unwrap();
    assert!(at(&marked, "/metadata/deletionTimestamp").is_string());
    assert_eq!(at(&marked, "/metadata/generation"), 2);
    assert!(version(&marked) > version(&made));
    assert_eq!(delete(&store, "a").await.unwrap(), marked, "a second deletion changes nothing");
    let more = set(&marked, "/metadata/finalizers", json!(["longhorn.io", "other", "third"]));
    let error = store.replace(&widgets(), more).await.unwrap_err();
    assert_eq!(error.kind(), api::ErrorKind::Invalid);
    assert!(error.to_string().contains("finalizers"), "{error}");
    let fewer = store.replace(&widgets(), set(&marked, "/metadata/finalizers", json!(["other"]))).await.unwrap();
    let mut watch = store.watch(&widgets(), None, Some(fewer.resource_version().into())).await.unwrap();
    let last = store.replace(&widgets(), set(&fewer, "/metadata/finalizers", json!([]))).await.unwrap();
    assert!(version(&last) >= version(&fewer));
    assert_eq!(read(&store, "a").await, None);
    assert_eq!(brief_events(&mut watch, 1).await, ["-a"]);
    assert_eq!(delete(&store, "a").await, None);
    let successor = store.create(&widgets(), widget("a", 1)).await.unwrap();
    assert_ne!(successor.uid(), made.uid());
}

pub async fn deletes_only_what_the_decision_was_made_on(store: Any) {
    let old = store.create(&widgets(), widget("a", 1)).await.unwrap();
    let new = store.replace(&widgets(), set(&old, "/spec/size", 2)).await.unwrap();
    for preconditions in [
        Preconditions { uid: Some("other".into()), resource_version: None },
        Preconditions { uid: Some(new.uid().into()), resource_version: Some(old.resource_version().into()) },
    ] {
        let error = store.delete(&widgets(), &key("a"), &preconditions).await.unwrap_err();
        assert!(matches!(error, StoreError::Precondition { .. }), "{error}");
        assert_eq!(error.kind(), api::ErrorKind::NotReady);
    }
    let exact =
        Preconditions { uid: Some(new.uid().into()), resource_version: Some(new.resource_version().to_owned()) };
    assert!(store.delete(&widgets(), &key("a"), &exact).await.unwrap().is_some());
    assert_eq!(read(&store, "a").await, None);
}

fn owned_by(owners: &[&Object], name: &str) -> Object {
    let reference = |(n, o): (usize, &&Object)| {
        json!({"apiVersion": at(o, "/apiVersion"), "kind": at(o, "/kind"), "name": o.name(), "uid": o.uid(),
               "blockOwnerDeletion": true, "controller": n == 0})
    };
    let references: Vec<Value> = owners.iter().enumerate().map(reference).collect();
    set(&widget(name, 1), "/metadata/ownerReferences", references)
}

pub async fn collects_what_nobody_owns_any_more(store: Any) {
    let top = store.create(&gadgets(), object(json!({"metadata": {"name": "top"}}))).await.unwrap();
    let middle = store.create(&widgets(), owned_by(&[&top], "middle")).await.unwrap();
    store.create(&widgets(), owned_by(&[&middle], "bottom")).await.unwrap();
    let held = set(&owned_by(&[&middle], "held"), "/metadata/finalizers", json!(["x"]));
    store.create(&widgets(), held).await.unwrap();
    store.create(&widgets(), widget("stranger", 1)).await.unwrap();
    let top_key = ObjectKey { namespace: None, name: "top".into() };
    store.delete(&gadgets(), &top_key, &Preconditions::default()).await.unwrap();
    for name in ["middle", "bottom"] {
        wait_until_gone(&store, &widgets(), &key(name)).await;
    }
    let mut watch = store.watch(&widgets(), None, None).await.unwrap();
    let held = loop {
        let held = read(&store, "held").await.expect("its finalizer holds it");
        if at(&held, "/metadata/deletionTimestamp").is_string() {
            break held;
        }
        next(&mut watch).await;
    };
    assert!(read(&store, "stranger").await.is_some());
    store.replace(&widgets(), set(&held, "/metadata/finalizers", json!([]))).await.unwrap();
    assert_eq!(read(&store, "held").await, None);
}

pub async fn keeps_what_has_another_owner(store: Any) {
    let one = store.create(&widgets(), widget("one", 1)).await.unwrap();
    let two = store.create(&widgets(), widget("two", 1)).await.unwrap();
    store.create(&widgets(), owned_by(&[&one, &two], "shared")).await.unwrap();
    delete(&store, "one").await;
    let mut watch = store.watch(&widgets(), None, None).await.unwrap();
    loop {
        let shared = read(&store, "shared").await.expect("the other owner is there");
        let owners = at(&shared, "/metadata/ownerReferences").as_array().unwrap().clone();
        if owners.len() == 1 {
            assert_eq!(owners[0]["name"], "two");
            break;
        }
        next(&mut watch).await;
    }
    delete(&store, "two").await;
    wait_until_gone(&store, &widgets(), &key("shared")).await;
}

pub async fn collects_an_object_whose_owner_was_gone_before(store: Any) {
    let owner = store.create(&widgets(), widget("owner", 1)).await.unwrap();
    delete(&store, "owner").await;
    store.create(&widgets(), owned_by(&[&owner], "late")).await.unwrap();
    wait_until_gone(&store, &widgets(), &key("late")).await;
    // The same when an object gets such an owner later.
    let plain = store.create(&widgets(), widget("plain", 1)).await.unwrap();
    let references = at(&owned_by(&[&owner], "x"), "/metadata/ownerReferences").clone();
    store.replace(&widgets(), set(&plain, "/metadata/ownerReferences", references)).await.unwrap();
    wait_until_gone(&store, &widgets(), &key("plain")).await;
}

pub async fn lists_by_namespace_and_label_in_order(store: Any) {
    for (namespace, name, color) in
        [("shop", "c", "red"), ("shop", "a", "red"), ("attic", "b", "red"), ("shop", "b", "blue")]
    {
        let mut object = set(&widget(name, 1), "/metadata/labels", json!({"color": color, "x": "y"}));
        object.0["metadata"]["namespace"] = namespace.into();
        store.create(&widgets(), object).await.unwrap();
    }
    let names = async |namespace, selector| -> Vec<String> {
        let list = store.list(&widgets(), namespace, &selector).await.unwrap();
        list.items.iter().map(|o| format!("{}/{}", o.namespace().unwrap(), o.name())).collect()
    };
    assert_eq!(names(None, Selector::default()).await, ["attic/b", "shop/a", "shop/b", "shop/c"]);
    assert_eq!(names(Some("shop"), Selector::label("color", "red")).await, ["shop/a", "shop/c"]);
    assert_eq!(names(None, Selector::label("color", "green")).await, [""; 0]);
    let both = Selector([("color".to_owned(), "red".to_owned()), ("x".to_owned(), "y".to_owned())].into());
    assert_eq!(names(Some("attic"), both).await, ["attic/b"]);
    assert_eq!(names(Some("sho"), Selector::default()).await, [""; 0]);
}

pub async fn keeps_kinds_and_scopes_apart(store: Any) {
    let other = kind("example.com", "Widget", true);
    store.create(&widgets(), widget("a", 1)).await.unwrap();
    store.create(&other, widget("a", 2)).await.unwrap();
    store.create(&gadgets(), object(json!({"metadata": {"name": "a"}, "spec": {"size": 3}}))).await.unwrap();
    // The core group has no name.
    let maps = kind("", "ConfigMap", true);
    let map = object(json!({"metadata": {"name": "a", "namespace": "shop"}, "data": {"size": "4"}}));
    store.create(&maps, map).await.unwrap();
    let map = store.get(&maps, &key("a")).await.unwrap().unwrap();
    assert_eq!((at(&map, "/apiVersion"), at(&map, "/kind")), (&json!("v1"), &json!("ConfigMap")));
    delete(&store, "a").await;
    assert_eq!(read(&store, "a").await, None);
    for (resource, field, size) in
        [(&other, "/spec/size", json!(2)), (&gadgets(), "/spec/size", json!(3)), (&maps, "/data/size", json!("4"))]
    {
        let namespace = resource.namespaced.then_some("shop");
        let list = store.list(resource, namespace, &Selector::default()).await.unwrap();
        assert_eq!((list.items.len(), at(&list.items[0], field)), (1, &size));
    }
}

pub async fn writes_one_content_as_one_text(store: Any) {
    let given: Value = serde_json::from_str(
        r#"{"spec":{"b":[{"z":1,"a":null}],"a":{"y":1,"x":2}},"metadata":{"namespace":"shop","name":"a"},"kind":"Widget"}"#,
    )
    .unwrap();
    store.create(&widgets(), object(given)).await.unwrap();
    let text = serde_json::to_string(&read(&store, "a").await.unwrap().0).unwrap();
    assert!(
        text.starts_with(r#"{"apiVersion":"example.org/v1","kind":"Widget","metadata":{"creationTimestamp":"#),
        "{text}"
    );
    assert!(text.ends_with(r#""spec":{"a":{"x":2,"y":1},"b":[{"a":null,"z":1}]}}"#), "{text}");
}
