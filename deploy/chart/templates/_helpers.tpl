{{- define "image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "labels" -}}
app.kubernetes.io/name: backing-image-csi
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- /* Of all pods of the release and, with a component, of one role. They may never change: they are selectors. */}}
{{- define "selector" -}}
app.kubernetes.io/name: backing-image-csi
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- define "env" -}}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: BACKING_IMAGE_CSI_LOG_FORMAT
  value: {{ .Values.logFormat }}
{{- end }}

{{- /* For containers that need nothing of their host. */}}
{{- define "unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 57345
runAsGroup: 57345
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* For sidecars of privileged pods: root, since the sockets are root's, and no more. */}}
{{- define "bare" -}}
runAsUser: 0
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* Two minutes to begin. After that the CSI socket tells whether the container lives, by way of the liveness-probe sidecar. */}}
{{- define "probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: csi-health}
  periodSeconds: 10
  timeoutSeconds: 6
  failureThreshold: 5
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 5
  timeoutSeconds: 3
{{- end }}

{{- define "liveness-probe" -}}
- name: liveness-probe
  image: {{ .Values.sidecars.livenessProbe.image }}
  imagePullPolicy: IfNotPresent
  args:
    - --csi-address=/csi/csi.sock
    - --health-port=9808
    - --probe-timeout=5s
{{- end }}

{{- define "priority" -}}
{{- with .Values.priorityClass.name -}}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* What all sidecars of the controller have. */}}
{{- define "sidecar" -}}
securityContext: {{- include "unprivileged" . | nindent 2 }}
resources: {{- toYaml .Values.sidecars.resources | nindent 2 }}
volumeMounts:
  - {name: csi, mountPath: /csi}
{{- end }}
