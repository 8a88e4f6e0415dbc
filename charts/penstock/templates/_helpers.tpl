{{/* The name that all objects of the release begin with. */}}
{{- define "penstock.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}{{ .Release.Name }}{{- else -}}{{ printf "%s-%s" .Release.Name $name }}{{- end -}}
{{- end -}}
{{- end -}}

{{/*
The name of one object: "FULLNAME-SUFFIX". Names end up in labels (63 characters) with a hash of Kubernetes' own behind
them, so a longer one than 52 is cut and told apart by a hash. Takes (list ROOT SUFFIX).
*/}}
{{- define "penstock.child" -}}
{{- $root := index . 0 -}}
{{- $long := printf "%s-%s" (include "penstock.fullname" $root) (index . 1) -}}
{{- if le (len $long) 52 -}}{{ $long }}{{- else -}}{{ printf "%s-%s" (trunc 43 $long | trimSuffix "-") (sha256sum $long | trunc 8) }}{{- end -}}
{{- end -}}

{{/* What selects the pods of one component. Takes (list ROOT COMPONENT). */}}
{{- define "penstock.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* All labels of an object. Takes (list ROOT COMPONENT). */}}
{{- define "penstock.labels" -}}
{{- $root := index . 0 -}}
{{ include "penstock.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: penstock
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
Labels of a pod: nothing that changes with the chart's version or with labels of the release, which would restart every
engine. Takes (list ROOT COMPONENT).
*/}}
{{- define "penstock.podLabels" -}}
{{ include "penstock.selector" . }}
app.kubernetes.io/part-of: penstock
{{- end -}}

{{/*
How many replicas a Deployment that something else scales keeps: those that it has now, or the first ones. Left out, the
API server would set 1 when the scaler is switched on. Takes (list ROOT NAME FIRST).
*/}}
{{- define "penstock.scaledReplicas" -}}
{{- $root := index . 0 -}}
{{- dig "spec" "replicas" (index . 2) (lookup "apps/v1" "Deployment" $root.Release.Namespace (index . 1) | default dict) | int -}}
{{- end -}}

{{/* How long the slowest engine group may load, in seconds; 0 where the chart has none. */}}
{{- define "penstock.longestStartupSeconds" -}}
{{- $longest := 0 -}}
{{- range .Values.engines -}}
{{- $defaults := ternary $.Values.engineDefaults.gpu $.Values.engineDefaults.virtual (eq .device "gpu") -}}
{{- $longest = max $longest (int (default $defaults.startupSeconds .startupSeconds)) -}}
{{- end -}}
{{- $longest -}}
{{- end -}}

{{/* An image's full reference; a digest wins over a tag. Takes (list ROOT IMAGE). */}}
{{- define "penstock.image" -}}
{{- $root := index . 0 -}}{{- $image := index . 1 -}}
{{- if $image.digest -}}{{ printf "%s@%s" $image.repository $image.digest }}
{{- else -}}{{ printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) }}{{- end -}}
{{- end -}}

{{/* A pod that is nobody, as the restricted profile of the Pod Security Standards asks. Takes the user's number. */}}
{{- define "penstock.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "penstock.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Where a pod may or should run. Takes the component's values. */}}
{{- define "penstock.placement" -}}
{{- $given := dict -}}
{{- range $field := list "priorityClassName" "nodeSelector" "tolerations" "affinity" -}}
{{- with get $ $field }}{{ $_ := set $given $field . }}{{ end -}}
{{- end -}}
{{- with $given }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{- define "penstock.pullSecrets" -}}
{{- with .Values.imagePullSecrets -}}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Redis: the Secret that holds its URL, and the key in it. */}}
{{- define "penstock.redis.secretName" -}}
{{- if .Values.redis.bundled.enabled -}}
{{- default (include "penstock.child" (list . "redis")) .Values.redis.bundled.existingSecret -}}
{{- else -}}
{{- required "redis.external.existingSecret is empty: name the Secret that holds the URL of your Redis, or set redis.bundled.enabled" .Values.redis.external.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "penstock.redis.env" -}}
- name: PENSTOCK_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ include "penstock.redis.secretName" . }}
      key: {{ ternary "url" .Values.redis.external.key .Values.redis.bundled.enabled }}
{{- end -}}

{{- define "penstock.redis.caMount" -}}
{{- if and (not .Values.redis.bundled.enabled) .Values.redis.external.tls.caSecret -}}
- name: redis-ca
  mountPath: {{ .Values.redis.external.tls.mountPath }}
  readOnly: true
{{- end }}
{{- end -}}

{{- define "penstock.redis.caVolume" -}}
{{- if and (not .Values.redis.bundled.enabled) .Values.redis.external.tls.caSecret -}}
- name: redis-ca
  secret:
    secretName: {{ .Values.redis.external.tls.caSecret }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{- define "penstock.adminToken.secretName" -}}
{{- default (include "penstock.child" (list . "admin-token")) .Values.adminToken.existingSecret -}}
{{- end -}}

{{/*
How long a gateway's pod may take to end, in seconds: until every proxy has heard of it, the streams' own time, the
settling of what they used, and a margin for the exit itself.
*/}}
{{- define "penstock.gateway.graceSeconds" -}}
{{- add .Values.gateway.drainDelaySeconds .Values.gateway.drainSeconds 5 5 -}}
{{- end -}}

{{/* The config and the profiles beside it, as one folder. */}}
{{- define "penstock.configVolume" -}}
- name: config
  configMap:
    name: {{ include "penstock.child" (list . "config") }}
    items:
      - key: penstock.yaml
        path: penstock.yaml
      {{- range $file, $_ := .Values.profiles }}
      - key: {{ $file }}
        path: profiles/{{ $file }}
      {{- end }}
{{- end -}}
