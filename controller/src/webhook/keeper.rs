//! Keeps the Secret and the configurations in order. Any number of replicas may do so at once: who was slower observes again.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::api::ObjectMeta;
use store::{Store, StoreError};

use super::certificate::{self, Pair, Rules, Step, Stored};
use super::{Config, SECRET, WebhookError, configurations};
use crate::limits::CERTIFICATE_ATTEMPTS;

pub struct Keeper {
    store: Store,
    rules: Rules,
}

impl Keeper {
    pub fn new(config: &Config) -> Keeper {
        let Config { store, names, lifetime_days, renew_days, .. } = config;
        let rules = Rules { names: names.clone(), lifetime_days: *lifetime_days, renew_days: *renew_days };
        Keeper { store: store.clone(), rules }
    }

    /// One pass: observes, decides, acts. Returns what is to be served.
    pub async fn pass(&self) -> Result<Pair, WebhookError> {
        let mut attempt = 1;
        loop {
            match self.once().await {
                Err(WebhookError::Store { source, .. }) if is_overtaken(&source) && attempt < CERTIFICATE_ATTEMPTS => {
                    attempt += 1;
                }
                done => return done,
            }
        }
    }

    async fn once(&self) -> Result<Pair, WebhookError> {
        let secret: Option<Secret> = self.store.get(SECRET).await.map_err(doing("read the Secret of the webhook"))?;
        let stored = secret.as_ref().and_then(|secret| Stored::read(secret.data.as_ref()?));
        let authorities = stored.as_ref().map(|stored| stored.authorities.as_str()).unwrap_or_default();
        let trusted = configurations::trust(&self.store, authorities).await;
        let is_registered = trusted.map_err(doing("read the webhook configurations"))?;
        let now = Timestamp::now();
        let step = certificate::decide(stored.as_ref(), is_registered, now, &self.rules);
        let kept = certificate::after(step, stored, now, &self.rules)
            .map_err(|source| WebhookError::Make { names: self.rules.names.join(", "), source })?
            .expect("each step leaves a certificate");
        if step != Step::Keep {
            self.write(secret, &kept).await?;
            tracing::info!(step = ?step, "certificate of the webhook written");
        }
        let registered = configurations::register(&self.store, &kept.authorities).await;
        registered.map_err(doing("write the webhook configurations"))?;
        Ok(kept.current)
    }

    async fn write(&self, secret: Option<Secret>, stored: &Stored) -> Result<(), WebhookError> {
        let data = Some(stored.write());
        let written = match secret {
            Some(old) => self.store.replace(&Secret { data, ..old }).await,
            None => {
                let metadata = ObjectMeta { name: Some(SECRET.into()), ..Default::default() };
                let type_ = Some("kubernetes.io/tls".into());
                self.store.create(&Secret { metadata, data, type_, ..Default::default() }).await
            }
        };
        written.map(drop).map_err(doing("write the Secret of the webhook"))
    }
}

/// Somebody else was faster.
fn is_overtaken(error: &StoreError) -> bool {
    error.is_conflict() || matches!(error, StoreError::AlreadyExists { .. } | StoreError::NotFound { .. })
}

fn doing(doing: &'static str) -> impl FnOnce(StoreError) -> WebhookError {
    move |source| WebhookError::Store { doing, source }
}
