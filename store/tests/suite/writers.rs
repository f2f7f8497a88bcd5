//! Many writers at once.

use backing_image_store::Store;

use super::*;

pub async fn lets_one_of_many_writers_win(store: Any) {
    let widgets = &widgets();
    let made = store.create(widgets, widget("a", 0)).await.unwrap();
    let writers = (1..=16).map(|n| store.replace(widgets, set(&made, "/spec/size", n)));
    let results = futures::future::join_all(writers).await;
    let winners: Vec<_> = results.iter().filter_map(|r| r.as_ref().ok()).collect();
    assert_eq!(winners.len(), 1);
    assert!(results.iter().filter_map(|r| r.as_ref().err()).all(|e| e.is_conflict()));
    assert_eq!(read(&store, "a").await.as_ref(), Some(winners[0]));
    let makers = (0..16).map(|n| store.create(widgets, widget("b", n)));
    let made = futures::future::join_all(makers).await;
    assert_eq!(made.iter().filter(|r| r.is_ok()).count(), 1);
}

pub async fn modifies_under_contention_without_losing_a_change(store: Any) {
    let typed = Store::new(store, "longhorn-system");
    let mut image = api::BackingImage::new("a-1", Default::default());
    image.spec.min_number_of_copies = 0;
    typed.create(&image).await.unwrap();
    let writers = (0..8).map(|_| {
        let typed = typed.clone();
        tokio::spawn(async move {
            for _ in 0..5 {
                typed.modify::<api::BackingImage>("a-1", |i| i.spec.min_number_of_copies += 1).await.unwrap();
                let count = |i: &mut api::BackingImage| i.status.get_or_insert_default().size += 1;
                typed.modify_status::<api::BackingImage>("a-1", count).await.unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let image = typed.get::<api::BackingImage>("a-1").await.unwrap().unwrap();
    assert_eq!((image.spec.min_number_of_copies, image.status.unwrap().size), (40, 40));
    let error = typed.modify::<api::BackingImage>("b", |_| {}).await.unwrap_err();
    assert_eq!(error.to_string(), "BackingImage `b` does not exist");
}
